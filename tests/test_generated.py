"""Text that the model writes itself: its own predictions, reproducible, and only when it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit import api
from anyfit.calibration import generated as module
from anyfit.calibration.data import Segments
from anyfit.calibration.generated import Habits, generated, write
from anyfit.core.errors import DataError
from anyfit.evaluation import evaluate
from anyfit.progress import Silent
from anyfit.testing.models import VOCABULARY, tiny_model, tiny_text, tiny_tokenizer

LENGTH = 24
COUNTS = {"calibration": 5, "search": 3, "report": 4}
HABITS = Habits(start=0, end=1, restart=False, num_tokens=VOCABULARY)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


def own_text(model: PreTrainedModel, seed: int = 0) -> Segments:
    return generated(lambda: model, tiny_tokenizer(), COUNTS, length=LENGTH, seed=seed, progress=Silent())


def sample(model: PreTrainedModel, habits: Habits = HABITS, shape: tuple[int, int] = (4, LENGTH), seed: int = 0) -> Tensor:
    with Silent().stage("", 1) as stage:
        return write(model, habits, shape, torch.Generator().manual_seed(seed), stage)


@pytest.mark.usefixtures("same_random_state")
def test_same_seed_same_text_and_no_two_purposes_alike(model: PreTrainedModel) -> None:
    first, again, other = own_text(model), own_text(model), own_text(model, seed=1)
    assert first.digest == again.digest != other.digest
    for purpose, count in COUNTS.items():
        tokens = getattr(first, purpose)
        assert tokens.shape == (count, LENGTH) and tokens.dtype == torch.int64
        assert (tokens[:, 0] == 0).all()
    rows = torch.cat([first.calibration, first.search, first.report])
    assert len(rows.unique(dim=0)) == len(rows)
    assert "12 segments" not in first.notes[0] and "5 + 3 + 4 segments of 24 tokens" in first.notes[0]


def test_nothing_is_written_before_it_is_asked_for(model: PreTrainedModel) -> None:
    def refuse() -> PreTrainedModel:
        raise AssertionError("asked too early")

    text = generated(refuse, tiny_tokenizer(), COUNTS, length=LENGTH, seed=0, progress=Silent())
    assert text.num_segments("search") == 3
    assert text.num_pending == 12 * LENGTH
    written = own_text(model)
    assert written.search is written.search
    assert written.num_pending == 9 * LENGTH


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gpt_neox"])
def test_every_token_is_among_the_likeliest_that_the_model_predicts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOP_P", 0.5)
    model = tiny_model(kind)
    tokens = sample(model)
    with torch.inference_mode():
        probabilities = model(input_ids=tokens, use_cache=False).logits[:, :-1].softmax(-1)
    chosen = probabilities.gather(-1, tokens[:, 1:, None])
    likelier = probabilities.where(probabilities > chosen * (1 + 1e-4), 0).sum(-1)
    assert (likelier < 0.5 + 1e-4).all()
    assert (likelier > 0).any()


def test_tokens_come_as_often_as_the_model_expects(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOP_P", 1.1)
    second = sample(model, shape=(4000, 2))[:, 1]
    with torch.inference_mode():
        expected = model(input_ids=torch.zeros(1, 1, dtype=torch.int64)).logits[0, 0].softmax(-1) * 4000
    likely = expected > 20
    assert likely.sum() > 10
    deviations = (torch.bincount(second, minlength=VOCABULARY) - expected)[likely] / expected[likely].sqrt()
    assert deviations.abs().max() < 5 and 0.5 < deviations.std() < 1.5


def test_a_network_without_a_cache_reads_everything_again(model: PreTrainedModel) -> None:
    class Forgetful(torch.nn.Module):
        config, device = model.config, model.device

        def forward(self, input_ids: Tensor, past_key_values: None = None, use_cache: bool = False) -> object:
            assert past_key_values is None
            return type("Output", (), {"logits": model(input_ids=input_ids, use_cache=False).logits})

    assert torch.equal(sample(Forgetful()), sample(model))  # type: ignore[arg-type]


def test_text_starts_anew_after_its_end_and_padding_is_never_written(model: PreTrainedModel) -> None:
    tokens = sample(model, Habits(start=3, end=1, restart=True, num_tokens=6), (16, LENGTH))
    assert tokens.max() < 6
    ends = (tokens[:, :-1] == 1).nonzero()
    assert len(ends) > 10
    assert all(tokens[row, column + 1] == 3 for row, column in ends.tolist())


def test_without_a_token_to_start_with_the_model_chooses_one(model: PreTrainedModel) -> None:
    tokens = sample(model, Habits(start=None, end=None, restart=False, num_tokens=VOCABULARY), (8, 4))
    assert tokens.shape == (8, 4)
    assert len(tokens[:, 0].unique()) > 1
    tokenizer = tiny_tokenizer()
    assert Habits.of(tokenizer) == HABITS
    tokenizer.bos_token = None
    assert Habits.of(tokenizer).start == 1


def test_a_broken_model_is_told(model: PreTrainedModel) -> None:
    broken = tiny_model("llama")
    broken.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(DataError, match="not finite"):
        sample(broken)


def test_no_data_means_text_of_its_own_and_says_so(tiny_llama_folder: Path) -> None:
    planned = api.plan(tiny_llama_folder, formats=["Q4_0"], recipe="rtn", segments=6)
    assert any("writes itself, 6 + 16 + 32 segments of 256 tokens" in note for note in planned.notes)
    named = api.prepare(tiny_llama_folder, data=["self"], segments=6, length=LENGTH)
    assert named.segments.num_pending == (6 + 16 + 32) * LENGTH


def test_own_text_makes_a_family_and_the_same_one_again(tiny_llama_folder: Path, tmp_path: Path) -> None:
    made = [
        api.fit(tiny_llama_folder, data="self", formats=["Q4_0"], recipe="rtn", length=LENGTH, segments=4, output=tmp_path / name)
        for name in ("a.family", "b.family")
    ]
    assert (made[0].path / "family.json").read_bytes() == (made[1].path / "family.json").read_bytes()
    assert any("writes itself" in note for note in made[0].notes)


def test_own_text_is_not_measured_with(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for data in (None, "self", ["self"]):
        with pytest.raises(DataError, match="no text to measure on"):
            evaluate(tiny_llama_folder, data=data)
    Path("self").write_text(tiny_text(600))
    assert evaluate(tiny_llama_folder, data=["self"], length=LENGTH, segments=2).text == "self"
