"""What must hold of any storage format: run `check_format` on it, or each of `CHECKS` as a test of its own.

@pytest.mark.parametrize("check", CHECKS)
def test_my_format(check):
    check(MY_FORMAT)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from anyfit.core.errors import UserError
from anyfit.formats.aqlm import AdditiveFormat
from anyfit.formats.base import SPAN, CastFormat, Format, GridFormat, Scales, join, quantize
from anyfit.formats.table import TableFormat
from anyfit.formats.w8a8 import RoundedFormat
from anyfit.quantizers.rtn import encode_nearest

MANY_ROWS = 101
"""No round number, so that vectorised loops have a remainder."""


def check_format(format_: Format) -> None:
    """Raises AssertionError where the format breaks its contract."""
    for check in CHECKS:
        check(format_)


def check_bytes_are_counted_exactly(format_: Format) -> None:
    """What is stored takes the bytes foretold, for every legal row length, a short last span included."""
    for columns in _row_lengths(format_):
        data = _encode(format_, _weight(3, columns), _importance(columns))
        assert data.dtype == torch.uint8, f"{format_.name} stores {data.dtype}"
        rows, row_bytes, bytes_ = format_.data_rows((3, columns)), format_.row_bytes(columns), format_.bytes_((3, columns))
        assert tuple(data.shape) == (rows, row_bytes), f"{tuple(data.shape)}, foretold {rows} of {row_bytes} a row"
        assert bytes_ == format_.shared + 3 * (columns * format_.bits / 8 + format_.overhead), f"bytes of {columns} columns"
        assert 0 <= data.numel() - bytes_ < (row_bytes if format_.whole else 1), f"bytes of {columns} columns, filled up to a row"


def check_what_was_chosen_is_what_is_read(format_: Format) -> None:
    """Values decoded from the bytes are, bit for bit, those that the codes were chosen for."""
    for columns in _row_lengths(format_):
        weight = _weight(5, columns)
        if isinstance(format_, CastFormat):
            decoded = format_.decode(format_.encode(weight))
            assert torch.equal(format_.decode(format_.encode(decoded)), decoded), f"{format_.name} changes its own values"
            continue
        if isinstance(format_, AdditiveFormat):
            data = _encode(format_, weight, _importance(columns))
            assert torch.equal(format_.pack(format_.read(data)), data), f"{format_.name} reads other parts than it packed"
            _check_bits(format_.decode(data), format_.read(data).values, format_.name)
            continue
        if isinstance(format_, TableFormat):
            codes, tables = format_.read(format_.encode(weight, _importance(columns)))
            chosen = torch.take_along_dim(tables[:, -(2**format_.num_bits) :].float(), codes.long(), 1)
            _check_bits(format_.decode(format_.pack(codes, tables)), chosen, format_.name)
            continue
        if isinstance(format_, RoundedFormat):
            codes, scale = format_.read(format_.encode(weight, _importance(columns)))
            _check_bits(format_.decode(format_.pack(codes, scale)), codes.float() * scale[:, None], format_.name)
            continue
        assert isinstance(format_, GridFormat)
        scales = _fit(format_, weight, _importance(columns))
        codes, values = quantize(format_, weight, *_spread(format_, scales))
        _check_bits(format_.decode(format_.pack(codes, scales)), values, format_.name)
        scale, offset = _spread(format_, scales)
        any_codes = _any_codes(format_, codes)
        _check_bits(format_.decode(format_.pack(any_codes, scales)), format_.levels[any_codes.long()] * scale - offset, format_.name)


def check_values_on_the_grid_stay(format_: Format) -> None:
    """What was decoded, encoded again with the same scales, gives the same values, and codes and scales are read as packed."""
    if not isinstance(format_, GridFormat):
        return
    weight = _weight(5, format_.block * 2)
    scales = _fit(format_, weight, _importance(format_.block * 2))
    codes, values = quantize(format_, weight, *_spread(format_, scales))
    _, again = quantize(format_, values, *_spread(format_, scales))
    assert torch.equal(again, values), f"{format_.name} changes its own values"
    read, read_scales = format_.read(format_.pack(codes, scales))
    assert torch.equal(read, codes), f"{format_.name} reads other codes than it packed"
    for own, other in ((scales.scale, read_scales.scale), (scales.offset, read_scales.offset)):
        assert torch.equal(own, other), f"{format_.name} reads other scales than it packed"
    assert read_scales.stored.keys() == scales.stored.keys()
    for key, part in scales.stored.items():
        assert torch.equal(read_scales.stored[key], part), f"{format_.name} reads another {key} than it packed"


def check_odd_rows(format_: Format) -> None:
    """Rows of zeros stay exact; constants, outliers, the tiniest weights and dead inputs give finite values near by."""
    columns = max(format_.block, 64)
    weight = _weight(9, columns)
    weight[0] = 0
    weight[1], weight[2] = 0.75, -0.031
    weight[3, 7] = 500
    weight[4] *= 1e-12
    weight[5] *= 1e-40
    weight[6, : columns // 2] = 0
    for importance in (_importance(columns), torch.zeros(columns), torch.ones(columns).index_fill_(0, torch.arange(3, columns), 0)):
        decoded = _decoded(format_, weight, importance)
        assert decoded.isfinite().all(), f"{format_.name}: not finite"
        assert not decoded[0].any(), f"{format_.name}: zeros don't stay zeros"
        for row in (1, 2):
            worst = (decoded[row] / weight[row] - 1).abs().max().item()
            assert worst < 0.25, f"{format_.name}: a constant row is off by {worst:.0%}"
    if isinstance(format_, CastFormat) or (isinstance(format_, GridFormat) and format_.vector == 1):
        # An entry of a codebook has no zeros to put beside an outlier, and few clusters of a row none to spare for it.
        error = (_decoded(format_, weight, torch.ones(columns))[3, 7] / 500 - 1).abs().item()
        assert error < 0.25, f"{format_.name}: an outlier is off by {error:.0%}"


def check_too_large_is_refused(format_: Format) -> None:
    """A weight beyond the largest value is an error that names the format; none becomes infinite."""
    weight = _weight(2, format_.block)
    for magnitude in (6e4, 1e6, 1e10, 3e38):
        weight[1, 0] = magnitude
        decoded, refusal = None, None
        try:
            decoded = _decoded(format_, weight, torch.ones(format_.block))
        except UserError as error:
            refusal = error
        if refusal is None:
            assert decoded is not None and decoded.isfinite().all(), f"{format_.name}: {magnitude} is stored as something not finite"
        else:
            assert format_.name in refusal.problem and refusal.remedy, f"{format_.name}: {refusal}"


def check_illegal_row_lengths_are_refused(format_: Format) -> None:
    """`refuses` names the length that doesn't fit, and accepts the block."""
    long = 256 * format_.block
    assert format_.refuses((1 << 14, long)) is None
    if format_.block > 1:
        reason = format_.refuses((1 << 14, long + 1))
        assert reason and str(long + 1) in reason, f"{format_.name}: {reason!r}"
    if format_.overhead or format_.shared:
        for columns in (format_.block, 16 * format_.block, long):
            pays = format_.bytes_((3, columns)) < 2 * 3 * columns
            assert (format_.refuses((3, columns)) is None) == pays, f"{format_.name}: {columns} columns against 16 bits a weight"


def check_nothing_else_changes(format_: Format) -> None:
    """Inputs and the global random state stay as they are, and the same in gives the same out."""
    columns = max(format_.block, 64)
    weight, importance = _weight(6, columns), _importance(columns)
    kept, state = (weight.clone(), importance.clone()), torch.get_rng_state()
    data = _encode(format_, weight, importance)
    kept_data = data.clone()
    format_.decode(data)
    assert torch.equal(weight, kept[0]) and torch.equal(importance, kept[1]) and torch.equal(data, kept_data), (
        f"{format_.name}: inputs changed"
    )
    assert torch.equal(torch.get_rng_state(), state), f"{format_.name}: the global random state was touched"
    assert torch.equal(_encode(format_, weight, importance), data), f"{format_.name}: not deterministic"
    strided = weight.T.contiguous().T
    assert torch.equal(_encode(format_, strided, importance), data), f"{format_.name}: the order in memory matters"


def check_rows_are_alone(format_: Format) -> None:
    """A row's bytes don't depend on the other rows, unless they share something; and some can be decoded without the rest."""
    columns = SPAN if SPAN % format_.block == 0 else format_.block
    weight, importance = _weight(MANY_ROWS, columns), _importance(columns)
    data = _encode(format_, weight, importance)
    for which in (slice(7, 9), torch.tensor([3, 3, MANY_ROWS - 1])):
        assert torch.equal(format_.decode(format_.rows(data, which)), format_.decode(data)[which]), f"{format_.name}: some rows alone"
    if format_.whole:
        return
    for first, last in ((0, 1), (7, 9), (MANY_ROWS - 30, MANY_ROWS)):
        rows = _encode(format_, weight[first:last], importance)
        assert torch.equal(rows, data[first:last]), f"{format_.name}: rows {first} to {last} differ when alone"
    assert format_.decode(data[:0]).shape == (0, columns), f"{format_.name}: no rows"


def check_importance_counts(format_: Format) -> None:
    """The error that matters is smaller with the importance known than with all columns alike."""
    columns = max(format_.block, SPAN)
    weight, importance = _weight(64, columns), _importance(columns)

    def error(known: Tensor) -> float:
        return float((importance * (weight - _decoded(format_, weight, known)).square()).sum())

    assert error(importance) <= error(torch.ones(columns)), f"{format_.name}: the importance of columns does harm"


CHECKS: tuple[Callable[[Format], None], ...] = (
    check_bytes_are_counted_exactly,
    check_what_was_chosen_is_what_is_read,
    check_values_on_the_grid_stay,
    check_odd_rows,
    check_too_large_is_refused,
    check_illegal_row_lengths_are_refused,
    check_nothing_else_changes,
    check_rows_are_alone,
    check_importance_counts,
)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _weight(rows: int, columns: int) -> Tensor:
    """Normal numbers, with a different spread in each run of 16 columns and a few outliers."""
    generator = _generator(1)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    weight *= torch.where(torch.rand(rows, columns, generator=generator) < 0.01, 8, 1)
    spread = torch.rand(rows, columns // 16 + 1, generator=generator) + 0.5
    return weight * spread.repeat_interleave(16, 1)[:, :columns]


def _importance(columns: int) -> Tensor:
    return torch.randn(columns, generator=_generator(2)).exp()


def _row_lengths(format_: Format) -> Iterator[int]:
    yield format_.block
    yield SPAN + format_.block


def _fit(format_: GridFormat, weight: Tensor, importance: Tensor) -> Scales:
    return join([format_.fit(w, i) for w, i in zip(weight.split(SPAN, 1), importance.split(SPAN), strict=True)])


def _spread(format_: GridFormat, scales: Scales) -> tuple[Tensor, Tensor]:
    return scales.scale.repeat_interleave(format_.group, 1), scales.offset.repeat_interleave(format_.group, 1)


def _any_codes(format_: GridFormat, like: Tensor) -> Tensor:
    """Codes that have nothing to do with the weights; where columns are coded together, only what can be stored."""
    if format_.vector == 1:
        return torch.randint(0, len(format_.levels), like.shape, dtype=torch.uint8, generator=_generator(9))
    target = torch.randn(like.shape, generator=_generator(9)) * format_.levels.max()
    return quantize(format_, target, torch.ones(like.shape), torch.zeros(like.shape))[0]


def _encode(format_: Format, weight: Tensor, importance: Tensor) -> Tensor:
    if not isinstance(format_, GridFormat):
        return encode_nearest(format_, weight, importance)
    scales = _fit(format_, weight, importance)
    return format_.pack(quantize(format_, weight, *_spread(format_, scales))[0], scales)


def _decoded(format_: Format, weight: Tensor, importance: Tensor) -> Tensor:
    return format_.decode(_encode(format_, weight, importance))


def _check_bits(got: Tensor, expected: Tensor, name: str) -> None:
    assert got.dtype == torch.float32 and got.shape == expected.shape, f"{name} decodes {tuple(got.shape)}, {got.dtype}"
    different = (got.view(torch.int32) != expected.view(torch.int32)).sum().item()
    assert not different, f"{name}: {different} of {got.numel()} values differ from those chosen"
