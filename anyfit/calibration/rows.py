"""What a row of a data set says: its text, or its conversation as the model's own chat template writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from anyfit.core.errors import DataError

TEXT, MESSAGES = "text", "messages"


def text_of(row: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a row with a string `text`, or a list of `messages`. Raises `DataError`, which names `where`."""
    if isinstance(row.get(TEXT), str):
        return str(row[TEXT])
    if isinstance(row.get(MESSAGES), list):
        return _conversation(row[MESSAGES], where, tokenizer)
    raise DataError(f'{where} has neither "text" nor "messages".', remedy='Write rows such as {"text": "..."}.')


def _conversation(messages: list[Any], where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise DataError(f'{where} has "messages", but the tokenizer has no chat template.', remedy='Give rows with "text".')
    render: Callable[..., Any] = tokenizer.apply_chat_template
    try:
        return str(render(messages, tokenize=False))
    except (jinja2.TemplateError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{where}: the chat template refuses its messages ({error}).",
            remedy='Each message needs a "role" and a "content" that the template knows.',
        ) from error
