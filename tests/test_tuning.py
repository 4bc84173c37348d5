"""Tuning of codes and halves by gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit.architectures import architecture_of
from anyfit.formats import formats
from anyfit.formats.base import GridFormat, join
from anyfit.progress import Silent
from anyfit.tasks.language import Reference, kl
from anyfit.testing.models import tiny_model
from anyfit.trainers import loop, pv
from anyfit.tuning import moving
from anyfit.tuning.coded import Coded, Matrix, Tuned
from anyfit.tuning.signround import Settings, tune

SHORT = Settings(num_segments=16, batch_size=2, rate=0.1, half_rate=0.02)
SCALAR = ("Q2_K", "Q3_K", "IQ4_NL", "MXFP4", "int2_asym")


def grid(name: str) -> GridFormat:
    format_ = formats.get(name)
    assert isinstance(format_, GridFormat)
    return format_


def tokens(num_segments: int, seed: int) -> Tensor:
    return torch.randint(256, (num_segments, 24), generator=torch.Generator().manual_seed(seed))


def coded(format_: GridFormat, weight: Tensor) -> Coded:
    """Rounded to the nearest."""
    spans = weight.split(256, 1)
    scales = join([format_.fit(span.contiguous(), torch.ones(span.shape[1])) for span in spans])
    scale, offset = (part.repeat_interleave(format_.group, 1) for part in (scales.scale, scales.offset))
    target = torch.where(scale == 0, 0, (weight + offset) / scale)
    vectors = target.unflatten(1, (-1, format_.vector)).movedim(2, 0).contiguous()
    return Coded(format_, format_.codes(vectors, torch.eye(format_.vector)).movedim(0, 2).flatten(1), scales)


@cache
def network(model_type: str = "llama") -> PreTrainedModel:
    return tiny_model(model_type, num_hidden_layers=1, vocab_size=256, tie_word_embeddings=True).requires_grad_(False)


def matrices(model: PreTrainedModel, choose: dict[str, str], *, everywhere: str, order: bool = False) -> dict[str, Matrix]:
    """Every matrix in the format that `choose` has for its role; `order` reverses the stored rows."""
    found = {}
    for weight in architecture_of(model).weights(model):
        values = model.get_parameter(weight.name)
        values = values.T if weight.transposed else values
        rows = torch.arange(len(values)).flip(0) if order else None
        values = values.contiguous() if rows is None else values[rows]
        found[weight.name] = Matrix(coded(grid(choose.get(weight.role, everywhere)), values), values, rows, weight.transposed)
    return found


def tuned(model: PreTrainedModel, given: dict[str, Matrix], settings: Settings = SHORT) -> Tuned:
    """Tuned and judged on the same text: what a random network does on random text doesn't carry over to any other."""
    reference = Reference.of(model, tokens(8, 1))
    return tune(model, given, reference, reference, settings=settings, progress=Silent())


def divergence(model: PreTrainedModel, given: dict[str, Matrix], result: dict[str, Coded]) -> float:
    """Of a network with the values that the bytes decode to, from the original, on the text that decides."""
    reference = Reference.of(model, tokens(8, 1))
    kept = {name: model.get_parameter(name).clone() for name in given}
    for name, entry in result.items():
        values = entry.format_.decode(entry.data)
        matrix = given[name]
        if matrix.order is not None:
            values = values[matrix.order.argsort()]
        model.get_parameter(name).copy_(values.T if matrix.transposed else values)
    found = kl(model, reference)
    for name, values in kept.items():
        model.get_parameter(name).copy_(values)
    return found


@pytest.mark.parametrize("name", SCALAR)
def test_the_bytes_predict_better_than_those_given(name: str) -> None:
    model = network()
    given = matrices(model, {}, everywhere=name)
    before = {parameter: values.clone() for parameter, values in model.named_parameters()}
    result = tuned(model, given)
    assert all(torch.equal(values, before[parameter]) for parameter, values in model.named_parameters())
    assert result.before == pytest.approx(divergence(model, given, {n: m.coded for n, m in given.items()}), rel=1e-4)
    assert result.after == pytest.approx(divergence(model, given, result.coded), rel=1e-4)
    assert result.after < 0.95 * result.before
    for entry in result.coded.values():
        codes, scales = entry.format_.read(entry.data)
        assert torch.equal(codes, entry.codes)
        assert int(codes.max()) < len(entry.format_.levels)
        assert torch.equal(scales.scale, entry.scales.scale) and torch.equal(scales.offset, entry.scales.offset)
        assert scales.scale.isfinite().all() and scales.offset.isfinite().all()


def test_transposed_and_reordered_matrices_of_several_formats() -> None:
    model = network("gpt2")
    given = matrices(model, {"o": "Q2_K", "up": "int2_asym"}, everywhere="Q3_K", order=True)
    assert any(matrix.transposed for matrix in given.values())
    assert len({matrix.coded.format_.name for matrix in given.values()}) > 1
    result = tuned(model, given)
    assert result.after == pytest.approx(divergence(model, given, result.coded), rel=1e-4)
    assert result.after < 0.95 * result.before
    assert list(result.coded) == list(given)


def test_order_of_stored_rows_makes_no_difference() -> None:
    model = network()
    straight = tuned(model, matrices(model, {}, everywhere="Q3_K"))
    reversed_ = tuned(model, matrices(model, {}, everywhere="Q3_K", order=True))
    for name, entry in straight.coded.items():
        assert torch.equal(entry.data, reversed_.coded[name].data.flip(0))


def test_deterministic_and_without_global_randomness() -> None:
    model = network()
    given = matrices(model, {}, everywhere="Q2_K")
    state = torch.random.get_rng_state()
    first, second = tuned(model, given), tuned(model, given)
    other = tuned(model, given, replace(SHORT, seed=1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(entry.data, second.coded[name].data) for name, entry in first.coded.items())
    assert any(not torch.equal(entry.data, other.coded[name].data) for name, entry in first.coded.items())


def test_never_worse_than_what_was_given() -> None:
    """A rate far too high destroys the network; the start is returned."""
    model = network()
    given = matrices(model, {}, everywhere="Q4_K")
    result = tuned(model, given, replace(SHORT, rate=20.0, half_rate=5.0))
    assert result.after == result.before
    assert all(result.coded[name] is matrix.coded for name, matrix in given.items())


def test_codebooks_keep_their_codes() -> None:
    name = next(name for name in formats if getattr(formats.get(name), "vector", 1) > 1)
    model = network()
    given = matrices(model, {}, everywhere=name)
    result = tuned(model, given)
    assert result.after < result.before
    assert all(torch.equal(entry.codes, given[name].coded.codes) for name, entry in result.coded.items())
    assert any(not torch.equal(entry.scales.scale, given[name].coded.scales.scale) for name, entry in result.coded.items())


def test_no_steps_change_nothing() -> None:
    """The latents start where they round to the codes given, for grids of uneven levels too."""
    model = network()
    for name in SCALAR:
        given = matrices(model, {}, everywhere=name)
        result = tuned(model, given, replace(SHORT, rate=0.0, half_rate=0.0, lean=0.98, num_segments=2))
        for parameter, matrix in given.items():
            values = [entry.format_.decode(entry.data) for entry in (matrix.coded, result.coded[parameter])]
            assert torch.equal(*values)


FEW = pv.Settings(num_steps=30, code_rate=0.06)


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ3_S", "Q2_K", "int2_asym", "MXFP4"])
@pytest.mark.parametrize("share", [0.05, 1.0])
def test_pv_tuning_changes_codes_and_scales_to_what_can_be_stored(name: str, share: float) -> None:
    given = matrices(network(), {"embedding": "Q8_0"}, everywhere=name, order=True)
    text = [Reference.of(network(), tokens(16, 1))] * 2
    before = [parameter.clone() for parameter in network().parameters()]
    found = pv.tune(network(), given, *text, settings=replace(FEW, share=share), progress=Silent())
    scales_alone = pv.tune(network(), given, *text, settings=replace(FEW, share=1e-9), progress=Silent())
    assert found.after < 0.8 * scales_alone.after < 0.8 * found.before
    assert all(torch.equal(one, other) for one, other in zip(before, network().parameters(), strict=True))
    changed = 0
    for key, entry in found.coded.items():
        codes, scales = entry.format_.read(entry.data)
        assert torch.equal(codes, entry.codes) and torch.equal(scales.scale, entry.scales.scale), "what is tuned is what is stored"
        changed += int((codes != given[key].coded.codes).sum())
    assert changed > 0
    again = pv.tune(network(), given, *text, settings=replace(FEW, share=share), progress=Silent())
    assert all(torch.equal(entry.data, again.coded[key].data) for key, entry in found.coded.items())


@pytest.mark.parametrize("patience", [None, 1])
@pytest.mark.parametrize("name", ["IQ2_XXS", "Q2_K", "MXFP4"])
def test_pv_tuning_goes_on_from_any_checkpoint_to_the_same_bytes(name: str, patience: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it ends as it is or as it was when held-out text, which isn't that of the training here, was predicted best."""
    monkeypatch.setattr(loop, "SECONDS", -1.0)
    monkeypatch.setattr(loop, "EVERY", 2)
    given = matrices(network(), {"embedding": "Q8_0"}, everywhere=name, order=True)
    text, settings = [Reference.of(network(), tokens(16, seed)) for seed in (1, 2)], replace(FEW, num_steps=8, patience=patience)
    kept = list[dict[str, Tensor]]()
    found = pv.tune(network(), given, *text, settings=settings, progress=Silent(), keep=kept.append)
    assert len(kept) == 8 or (patience and kept)
    for checkpoint in (kept[0], kept[len(kept) // 2], kept[-1]):
        again = pv.tune(network(), given, *text, settings=settings, progress=Silent(), checkpoint=checkpoint)
        assert (again.before, again.after) == (found.before, found.after)
        assert all(torch.equal(entry.data, again.coded[key].data) for key, entry in found.coded.items())


def test_pv_tuning_ends_as_it_was_when_held_out_text_was_predicted_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "EVERY", 1)
    given = matrices(network(), {}, everywhere="int2_asym")
    losses, states = iter((3.0, 2.0, 1.0, 2.0, 3.0, 4.0, 5.0)), list[Tensor]()

    def measured(model: PreTrainedModel, _: Reference) -> float:
        states.append(torch.cat([model.get_parameter(name).detach().flatten() for name in given]))
        return next(losses)

    monkeypatch.setattr(pv, "kl", measured)
    text = [Reference.of(network(), tokens(16, 1))] * 2
    found = pv.tune(network(), given, *text, settings=replace(FEW, num_steps=6, code_rate=0.3, patience=2), progress=Silent())
    before, *watched, after = states
    assert (found.before, found.after) == (3.0, 5.0) and len(watched) == 5
    assert torch.equal(before, watched[0]) and not torch.equal(watched[1], watched[3])
    assert (after - watched[1]).norm() < 0.1 * (after - watched[3]).norm(), "all but the rounding of halves"


def test_only_a_share_of_the_vectors_moves_in_a_step() -> None:
    (matrix,) = (entry for name, entry in matrices(network(), {"embedding": "Q8_0"}, everywhere="IQ2_XXS").items() if "up_proj" in name)
    subject = moving.GridSubject(matrix, 0.1)
    gradient = torch.randn(subject.codes.shape, generator=torch.Generator().manual_seed(0))
    kept, given = subject.codes.clone(), subject.values()
    subject.move(gradient, {"continuous": FEW.rate, "codes": 1.0}, 1)
    other = (subject.codes != kept).unflatten(1, (-1, 8)).any(-1)
    assert 0 < subject.changed == int(other.sum()) <= round(0.1 * subject.num_vectors)
    away = (subject.buffer - given).square().unflatten(1, (-1, 8)).sum(-1)
    assert away[other].min() > 0.8 * away.flatten().kthvalue(round(0.9 * away.numel())).values, "those that want to move furthest"


def test_all_codes_at_once_are_those_nearest_to_the_buffer() -> None:
    (matrix,) = (entry for name, entry in matrices(network(), {}, everywhere="int3_sym").items() if "up_proj" in name)
    subject = moving.GridSubject(matrix, 1.0)
    gradient = torch.randn(subject.codes.shape, generator=torch.Generator().manual_seed(0))
    subject.move(gradient, {"continuous": FEW.rate, "codes": FEW.code_rate}, 1)
    scale = subject._grid()[0].repeat_interleave(32, 1)
    assert torch.equal(subject.codes.float() - 4, (subject.buffer / scale).round().clamp(-4, 3))
