"""How a command answers: tables for a person or one JSON document, errors as messages with a remedy, and exit codes."""

from __future__ import annotations

import errno
import functools
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from anyfit.core.errors import OutputError, UserError
from anyfit.core.files import output_error
from anyfit.progress import speaks

if TYPE_CHECKING:
    from rich.console import RenderableType

USER_ERROR, INTERRUPTED = 2, 130
_KEPT_BY = {"fit": "What is finished is kept: the same command goes on from there."}

app = typer.Typer(
    help="Train once. Fit any budget: one run turns a network into a family, and any size is taken from it in seconds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@dataclass(frozen=True)
class Answer:
    """What a command found out: the document for `--json`, and what a person is shown instead."""

    document: Any
    shown: tuple[RenderableType, ...]


def run(arguments: Sequence[str]) -> None:
    """Run the command line and exit. With `--json`, what is wrong with the options themselves is a document, too."""
    try:
        app(arguments, prog_name="anyfit")
    except SystemExit as end:
        # Only click's usage errors have this; typer brings a click of its own, so their class can't be imported.
        message = getattr(end.__context__, "format_message", None)
        if message and "--json" in arguments:
            _print_error(message(), "See --help.")
        raise


def command(function: Callable[..., Answer]) -> Callable[..., None]:
    """Make `function` a command. Prints its answer, by its option `json_`, and turns errors into exit codes."""

    @app.command()
    @functools.wraps(function)
    def guarded(**given: Any) -> None:
        as_json = given["json_"]
        try:
            with redirect_stdout(sys.stderr):
                answer = function(**given)
        except UserError as error:
            _fail(error, as_json)
        except OSError as error:
            _fail(_user_error(error), as_json)
        except KeyboardInterrupt:
            kept = _KEPT_BY.get(function.__name__, "Nothing was written.")
            print(f"\nStopped. {kept}", file=sys.stderr)
            if as_json:
                _print_error("interrupted", kept)
            raise typer.Exit(INTERRUPTED) from None
        if speaks():
            _print(answer, as_json)

    return guarded


def _fail(error: UserError, as_json: bool) -> NoReturn:
    print("\n  ".join(filter(None, (f"error: {error.problem}", error.remedy))), file=sys.stderr)
    if as_json:
        _print_error(error.problem, error.remedy)
    raise typer.Exit(USER_ERROR) from error


def _print_error(problem: str, remedy: str) -> None:
    print(json.dumps({"error": problem, "remedy": remedy}, ensure_ascii=False))


def _user_error(error: OSError) -> UserError:
    """What the file system refused, if that is the user's to mend; else the error is ours and is raised again."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return output_error(error, Path(error.filename or "the output"))
    if error.errno in (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
        return OutputError(f"{error.filename}: {error.strerror}.", remedy="Check the path and its permissions.")
    raise error


def _print(answer: Answer, as_json: bool) -> None:
    if as_json:
        print(json.dumps(answer.document, indent=1, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    for part in answer.shown:
        console.print(part, soft_wrap=isinstance(part, str))
