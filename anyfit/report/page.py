"""One self-contained page about a family: it asks for nothing from anywhere, and its bytes depend on the family alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from anyfit.core.budget import BYTES, LATENCY, WEIGHTS, describe
from anyfit.core.files import written_aside
from anyfit.report import sparsity, summary
from anyfit.report.charts import Axis, Box, Label, floored, place
from anyfit.report.summary import Row
from anyfit.structure.levels import worded
from anyfit.tasks.base import plus_minus

if TYPE_CHECKING:
    from anyfit.family import Family

WIDTH, HEIGHT = 1040, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, WIDTH - 16, 16, HEIGHT - 48
_LABELS = {LATENCY: ("latency as budgets count it, ms", 1.0), WEIGHTS: ("weights in the blocks that aren't zero, millions", 1e6)}
"""Of costs other than bytes: what stands below the chart, and its unit."""
SIDE = 440
"""Width and height of the square chart of predicted against measured."""


def write(family: Family, path: Path) -> None:
    """Write the page to `path`, whole or not at all. Raises `OutputError` where that can't be done."""
    text = render(family)
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def render(family: Family) -> str:
    """The page's HTML. Names that came from outside are escaped."""
    rows = summary.rows(family)
    uniform = [(row, summary.rival(rows, row)) for row in rows if row.point.uniform]
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            family=family,
            rows=rows,
            split=summary.split(family),
            uniform=uniform,
            bits=family.space.format_bits(),
            frontier_chart=_frontier_chart(rows, family.space.scale, named=not family.masked),
            prediction_chart=_prediction_chart(family),
            sparsity_chart=_sparsity_chart(family),
            grid=_grid(family),
            refusals=summary.refusals(family),
            provenance=summary.flat(family.provenance),
            data=_data(family, rows),
        )
    )


def environment() -> Environment:
    """Templates of this package, with HTML escaped and the figures' own ways of being written."""
    loader = PackageLoader("anyfit.report")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["size"] = lambda value: describe(BYTES, value)
    made.filters["thousands"] = lambda value: f"{value:,}"
    made.globals["plus_minus"] = plus_minus
    made.globals["saved"] = summary.saved
    return made


def _title(row: Row) -> str:
    name = f"uniform {row.point.uniform}: " if row.point.uniform else ""
    quality = row.quality
    return (
        f"{name}{describe(BYTES, row.point.bytes_)}, {row.point.bits:.2f} bits per weight\n"
        f"{', '.join(f'{figure} {value}' for figure, value in quality.columns().items())}"
    )


def _frontier_chart(rows: list[Row], scale: str, *, named: bool) -> dict[str, Any]:
    """Distance to the original against size, with one standard error each way. `named`: whether uniform settings have names beside them."""
    lift = floored([row.quality.loss for row in rows])
    label, per = _LABELS.get(scale, ("size of the file, GB", 1e9) if rows[-1].size >= 2e9 else ("size of the file, MB", 1e6))
    x = Axis.around([row.size / per for row in rows], _LEFT, _RIGHT)
    y = Axis.around([lift(row.quality.loss) for row in rows], _BOTTOM, _TOP, log=True)
    marks: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        quality, at = row.quality, x.at(row.size / per)
        mean = lift(quality.loss)
        error = quality.loss_stderr if math.isfinite(quality.loss_stderr) else 0.0
        ends = y.at(max(mean - error, y.low)), y.at(mean + error)
        marks.append({"index": index, "x": at, "y": y.at(mean), "ends": ends, "row": row, "title": _title(row)})
    return {
        "marks": marks,
        "line": " ".join(f"{m['x']},{m['y']}" for m in marks if m["row"].frontier),
        "labels": _labels(marks) if named else [],
        "x_ticks": [(x.at(v), f"{v:g}") for v in x.ticks()],
        "y_ticks": [(y.at(v), f"{v:g}") for v in y.ticks()],
        "label": label,
        "box": (WIDTH, HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM),
    }


def _labels(marks: list[dict[str, Any]]) -> list[Label]:
    taken: list[Box] = [(m["x"] - 5, m["y"] - 5, m["x"] + 5, m["y"] + 5) for m in marks]
    return place([(m["row"].point.uniform, m["x"], m["y"]) for m in marks if m["row"].point.uniform], taken, WIDTH)


def _prediction_chart(family: Family) -> dict[str, Any] | None:
    """Predicted against measured loss of every config, unrefined, on the search split; None where there is too little to compare."""
    measured = [(point.predicted, point.plain_loss, point) for point in family.points]
    pairs = [pair for pair in measured if pair[0] > 0 and pair[1] > 0]
    if len(pairs) < 3:
        return None
    from scipy.stats import spearmanr

    values = [value for pair in pairs for value in pair[:2]]
    x = Axis.around(values, 60, SIDE - 12, log=True)
    y = Axis.around(values, SIDE - 48, 12, log=True)
    correlation = float(spearmanr([pair[0] for pair in pairs], [pair[1] for pair in pairs]).statistic)
    return {
        "marks": [(x.at(p), y.at(m), bool(point.uniform), f"predicted {p:.3g}, measured {m:.3g}") for p, m, point in pairs],
        "ticks": [(x.at(v), y.at(v), f"{v:g}") for v in x.ticks() if math.log10(v).is_integer() or len(x.ticks()) < 6],
        "ends": (x.at(x.low), y.at(x.low), x.at(x.high), y.at(x.high)),
        "correlation": correlation,
        "side": SIDE,
    }


def _sparsity_chart(family: Family) -> dict[str, Any] | None:
    """Perplexity, or the distance, against the share of the weights that are removed, by what chose them; None where nothing is masked."""
    found = sparsity.curves(family)
    if not found:
        return None
    points = [(share, sparsity.figure(quality)) for curve in found for share, quality in curve.shares.items()]
    x = Axis.around([100 * share for share, _ in points], _LEFT, _RIGHT)
    what = sparsity.named(next(iter(found[0].shares.values())))
    y = Axis.around([figure for _, figure in points], _BOTTOM, _TOP, log=min(figure for _, figure in points) > 0)
    lines: list[dict[str, Any]] = []
    for curve in found:
        places = [(x.at(100 * share), y.at(sparsity.figure(quality)), share, quality) for share, quality in curve.shares.items()]
        dots = [
            (left, top, f"{curve.score}: {share:.0%} removed, {what} {sparsity.shown(quality)}", share == curve.knee)
            for left, top, share, quality in places
        ]
        squares = [
            (x.at(100 * (1 - mask.density)), y.at(sparsity.figure(quality)), f"{curve.score}: {mask}, {what} {sparsity.shown(quality)}")
            for mask, quality in curve.patterns.items()
        ]
        lines.append({"curve": curve, "line": " ".join(f"{left},{top}" for left, top, *_ in places), "dots": dots, "squares": squares})
    return {
        "what": what,
        "lines": lines,
        "labels": place([(line["curve"].score, *line["dots"][-1][:2]) for line in lines], [], WIDTH),
        "x_ticks": [(x.at(v), f"{v:g} %") for v in x.ticks()],
        "y_ticks": [(y.at(v), f"{v:g}") for v in y.ticks()],
        "rows": sparsity.rows(found),
        "box": (WIDTH, HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM),
    }


def _grid(family: Family) -> dict[str, Any]:
    """Cells of the picture of a config: roles down, blocks across, and what stands outside the blocks apart."""
    cells: dict[str, dict[int, tuple[int, str]]] = {}
    single = []
    for index, decision in enumerate(family.space.decisions):
        for weight in decision.unit.weights:
            cell = (index, f"{weight.name}  {weight.shape[0]} x {weight.shape[1]}")
            if weight.block is None:
                single.append((weight.role, cell))
            else:
                cells.setdefault(weight.role, {})[weight.block] = cell
    blocks = sorted({block for row in cells.values() for block in row})
    return {"blocks": blocks, "rows": cells, "single": single}


def _data(family: Family, rows: list[Row]) -> dict[str, Any]:
    """What the page's script needs: for each row of the table the format of every unit, as indices."""
    bits = family.space.format_bits()
    names = list(bits)
    keys = [decision.key for decision in family.space.decisions]
    return {
        "formats": [worded(name) for name in names],
        "bits": [round(bits[name], 4) for name in names],
        "weights": [decision.unit.num_weights for decision in family.space.decisions],
        "rows": [
            {
                "budget": summary.budget_of(family, row.point),
                "size": describe(BYTES, row.point.bytes_),
                "bits": f"{row.point.bits:.2f}",
                "figures": list(row.quality.columns().items()),
                "uniform": row.point.uniform,
                "frontier": row.frontier,
                "choices": [names.index(row.point.config[key]) for key in keys],
            }
            for row in rows
        ],
    }
