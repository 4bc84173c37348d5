"""Exact rewritings of a Llama in floating point, which might make it easier to round. In no part of anyfit: see `ablation.py`.

Each changes a network in place into another that computes the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anyfit.calibration.statistics import InputStatistics
from anyfit.formats.base import GridFormat
from anyfit.quantizers.rtn import RoundToNearest

POWERS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Of a column's magnitude, that are tried as its scale; 0 changes nothing."""
FIXED_POWER = 0.5
TOLERANCE = 1e-5
"""Of the largest logit: how far rounding in float32 may move one."""


@dataclass(frozen=True)
class Seam:
    """Where a factor for each column can be moved: `readers` multiply what `writer` (a norm's weight, or a projection) puts out.

    `input_` names the readers' input. `repeats`: each `width` outputs of the writer are read so often in succession, as by
    the heads that share their values.
    """

    input_: str
    readers: tuple[nn.Linear, ...]
    writer: nn.Module
    repeats: int = 1
    width: int = 1

    def spread(self, scale: Tensor) -> Tensor:
        """From one factor for each output of the writer to one for each column of the readers."""
        return scale.view(-1, 1, self.width).expand(-1, self.repeats, -1).flatten()

    def gathered(self, squares: Tensor) -> Tensor:
        """The means, for each output of the writer, of what its readers' columns have."""
        return squares.view(-1, self.repeats, self.width).mean(1).flatten()

    @torch.no_grad()
    def move(self, scale: Tensor) -> None:
        """Multiply the readers' columns and divide the writer's outputs by `scale` (outputs of the writer,)."""
        for reader in self.readers:
            reader.weight.mul_(self.spread(scale))
        weight = self.writer.weight
        assert isinstance(weight, Tensor)
        weight.div_(scale if weight.ndim == 1 else scale[:, None])


def seams(model: PreTrainedModel, *, inner: bool) -> Iterator[Seam]:
    """Behind the norms; with `inner` also from the values to o and from up to down."""
    config = model.config
    repeats = config.num_attention_heads // config.num_key_value_heads
    for i, layer in enumerate(model.model.layers):
        at, attention, mlp = f"model.layers.{i}.", layer.self_attn, layer.mlp
        yield Seam(at + "attention", (attention.q_proj, attention.k_proj, attention.v_proj), layer.input_layernorm)
        if inner:
            yield Seam(at + "attention_output", (attention.o_proj,), attention.v_proj, repeats, config.head_dim)
        yield Seam(at + "feed_forward", (mlp.gate_proj, mlp.up_proj), layer.post_attention_layernorm)
        if inner:
            yield Seam(at + "feed_forward_output", (mlp.down_proj,), mlp.up_proj)


def scale_columns(model: PreTrainedModel, statistics: Mapping[str, InputStatistics], format_: GridFormat, *, inner: bool) -> None:
    """As AWQ (arXiv 2306.00978): columns times a power of their inputs' magnitude, the power that plain rounding does best with."""
    for seam in seams(model, inner=inner):
        found = statistics[seam.input_]
        magnitude = seam.gathered(found.diagonal).sqrt()
        errors = {power: _rounding_error(seam, found, format_, _power(magnitude, power)) for power in POWERS}
        seam.move(_power(magnitude, min(errors, key=errors.__getitem__)))


def smooth_columns(model: PreTrainedModel, statistics: Mapping[str, InputStatistics], format_: GridFormat) -> None:
    """As SmoothQuant (arXiv 2211.10438): half of the way from inputs of the same size to columns of the same size, behind the norms."""
    for seam in seams(model, inner=False):
        largest = torch.cat([reader.weight.detach() for reader in seam.readers]).abs().amax(0)
        magnitude = statistics[seam.input_].diagonal.sqrt()
        seam.move(_power(magnitude, FIXED_POWER) / _power(largest, 1 - FIXED_POWER))


def _power(magnitude: Tensor, power: float) -> Tensor:
    """Around 1 in the middle of its range; dead columns stay as they are."""
    scale = torch.where(magnitude > 0, magnitude, magnitude[magnitude > 0].mean()).pow(power)
    return scale / (scale.min() * scale.max()).sqrt()


def _rounding_error(seam: Seam, statistics: InputStatistics, format_: GridFormat, scale: Tensor) -> float:
    """Expected squared error of the readers' outputs when their scaled columns are rounded."""
    columns = seam.spread(scale)
    scaled = InputStatistics(statistics.hessian / columns / columns[:, None], statistics.count)
    weight = torch.cat([reader.weight.detach() for reader in seam.readers])
    return RoundToNearest().encode(weight * columns, scaled, format_).error


def hadamard(size: int, seed: int) -> Tensor:
    """Orthogonal (size, size) float64, `size` a power of two: Sylvester's, its rows with random signs."""
    assert size & (size - 1) == 0, f"{size} is no power of two"
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(2, (size, 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return signs * matrix / size**0.5


@torch.no_grad()
def rotate_stream(model: PreTrainedModel, seed: int = 0) -> None:
    """As QuaRot (arXiv 2404.00456): norms' weights into what reads them, then another basis for the residual stream.

    The head gets a matrix of its own where it shared the embedding's.
    """
    rotation = hadamard(model.config.hidden_size, seed)
    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    reading = [(seam.writer, seam.readers) for seam in seams(model, inner=False)]
    for norm, readers in [*reading, (model.model.norm, (model.lm_head,))]:
        for reader in readers:
            _put(reader.weight, (reader.weight.double() * norm.weight.double()) @ rotation)
        norm.weight.fill_(1)
    _put(model.model.embed_tokens.weight, model.model.embed_tokens.weight.double() @ rotation)
    for layer in model.model.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            _put(writer.weight, rotation.T @ writer.weight.double())


@torch.no_grad()
def rotate_heads(model: PreTrainedModel, seed: int = 0) -> None:
    """Another basis for each head's values: v puts them out in it, o reads them in it."""
    rotation = hadamard(model.config.head_dim, seed)
    for layer in model.model.layers:
        values, output = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
        _put(values, (rotation.T @ values.double().unflatten(0, (-1, len(rotation)))).flatten(0, 1))
        _put(output, (output.double().unflatten(1, (-1, len(rotation))) @ rotation).flatten(1))


def _put(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values.float())


@torch.inference_mode()
def check(rewritten: PreTrainedModel, original: PreTrainedModel, tokens: Tensor) -> None:
    """Assert that both compute the same."""
    wanted = original(input_ids=tokens, use_cache=False).logits
    off = (rewritten(input_ids=tokens, use_cache=False).logits - wanted).abs().max() / wanted.abs().max()
    assert off < TOLERANCE, f"the logits moved by {off:.1e} of the largest: not the same network"


Rewriting = Callable[[PreTrainedModel, Mapping[str, InputStatistics], GridFormat], None]
"""Changes a network in place, knowing its inputs' statistics and the format that its blocks' matrices will have."""
