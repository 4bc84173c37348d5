"""The options that several commands of the command line share. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anyfit.core.effort import Effort

Model = Annotated[str | None, typer.Argument(help="A model folder or hub id. Default: the small embedded model.")]
FamilyPath = Annotated[Path, typer.Argument(metavar="FAMILY", help="The folder that `anyfit fit` wrote.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Text: a file, JSONL, parquet, a folder of them, or a data set of the Hugging Face hub as `hf:NAME` or "
        "`hf:NAME:CONFIG@SPLIT`; for a network of pictures: pictures, folders of them. May be repeated. `self`: what the model writes "
        "itself, the default for a language model of your own."
    ),
]
MeasuringData = Annotated[list[str] | None, typer.Option("--data", help="Text to measure on: as for `anyfit fit`, but not `self`.")]
TargetName = Annotated[
    str | None,
    typer.Option("--target", help="The runtime to write for: see `anyfit targets`. Default: that of --latency, or llama.cpp."),
]
Formats = Annotated[list[str] | None, typer.Option("--formats", "--format", help="Formats to offer, `Q4_K,Q6_K`. Default: the target's.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="The method: see `anyfit recipes`.")]
_BOUND = (
    "An upper bound: 1.5GB, '3.2 bits', 50%; of what is pruned 'macs <= 60%', and with measured latencies 20ms (a token, where decoding "
    "was measured) or 2x; of what is masked 'weights <= 60%'. Or the name of one of a family's members, Q4_K. May be repeated"
)
Budgets = Annotated[list[str], typer.Option("--budget", help=f"{_BOUND}; all hold.")]
MaybeBudgets = Annotated[list[str] | None, typer.Option("--budget", help=f"{_BOUND}.")]
Length = Annotated[int | None, typer.Option(min=1, help="Tokens in a segment of text. Default: the model's context, at most 2048.")]
Segments = Annotated[int | None, typer.Option(min=1, help="How many segments of text to use.")]
Latency = Annotated[
    Path | None,
    typer.Option(help="A table of `anyfit measure`, made on this device with the same --formats: a recipe that prunes then fits to ms."),
]
Importance = Annotated[
    str | None,
    typer.Option(
        help="By what a recipe that prunes says which heads and channels matter, instead of its own: obs, trajectory, magnitude, wanda, "
        "taylor; the last three also as `magnitude_repaired`, with what is kept repaired by least squares."
    ),
]
Recover = Annotated[
    list[str] | None,
    typer.Option(
        help="Budgets, the largest first, `1.25x,1.5x,2x`: a recipe that prunes then cuts and trains the network for one after another."
    ),
]
Towards = Annotated[
    str,
    typer.Option(
        help="What a recipe that trains does so towards: `original`, what the original predicts; or `task`, the text itself. Either way "
        "formats that don't come nearer to the original stay as they were."
    ),
]
Patience = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="A recipe that trains looks at held-out text every 100 steps, stops after so many looks without a gain, and keeps the best. "
        "Default: it goes on to the end, where the rate has fallen to zero.",
    ),
]
EffortName = Annotated[
    Effort,
    typer.Option(
        "--effort",
        help="low: quick formats. normal: also the best small ones. high: also lets evolution look around the smallest sizes and refines "
        "them (what is pruned or masked: evolution alone); up to 3x low's time.",
    ),
]
SearcherName = Annotated[
    str,
    typer.Option(
        "--search",
        help="Who proposes mixes: `exact`, by the measured scores alone; `evolution`, `correlation` or `layer-weights` also run mixes of "
        "all sizes, which then compete: see `anyfit searchers`.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="What the run may use, `8GB`, also of a graphics processor's; refused at once if that isn't enough. Default: three "
        "quarters of what is free."
    ),
]
DeviceName = Annotated[str, typer.Option("--device", help="cpu, cuda, or auto: a graphics processor where there is one.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model, or with a family of it.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
LogJson = Annotated[bool, typer.Option("--log-json", help="Tell progress as one JSON document a line, on standard error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
