"""Named tasks through lm-eval, where it is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from anyfit.core.errors import RuntimeMissingError, UserError
from anyfit.tasks.harness import run
from anyfit.testing.models import tiny_model, tiny_tokenizer

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: ["bada", "dede"]
metric_list:
  - metric: acc
"""


@pytest.mark.slow
def test_a_task_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    questions = [f"bada {number} dede" for number in range(8)]
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer.pad_token = None

    def likelihood(question: str, choice: str) -> float:
        prompt, whole = (tokenizer(text)["input_ids"] for text in (question, f"{question} {choice}"))
        with torch.no_grad():
            log_probs = torch.log_softmax(model(torch.tensor([whole])).logits[0], -1)
        return float(sum(log_probs[at - 1, whole[at]] for at in range(len(prompt), len(whole))))

    chosen = [int(likelihood(question, "dede") > likelihood(question, "bada")) for question in questions]
    answers = [choice if at % 4 else 1 - choice for at, choice in enumerate(chosen)]
    data = tmp_path / "data.json"
    data.write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a in zip(questions, answers, strict=True)))
    task = tmp_path / "tiny_choice.yaml"
    task.write_text(TASK.format(data=data))
    state = torch.get_rng_state()
    assert run(model, tokenizer, [str(task)])["tiny_choice"]["acc"] == 0.75
    assert torch.equal(torch.get_rng_state(), state)
    assert tokenizer.pad_token is None
    with pytest.raises(UserError, match="arc_easy"):
        run(model, tokenizer, ["arc_eazy"])


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RuntimeMissingError, match=r"anyfit\[eval\]"):
        run(tiny_model("llama"), tiny_tokenizer(), ["arc_easy"])
