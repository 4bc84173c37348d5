"""The networks of the comparison, each with the tokens that everybody gets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyfit.architectures import architecture_of
from anyfit.calibration.data import Segments, load
from anyfit.checkpoint import Checkpoint
from anyfit.core.units import Weight
from anyfit.tasks.language import Reference
from anyfit.zoo import DATA, MODEL

LENGTH, NUM_CALIBRATION, NUM_SEARCH, NUM_REPORT = 256, 128, 16, 96
EMBEDDED, LARGE, SMALL = "embedded default", "tinystories-llama-3m", "tinystories-llama-260k"
GROUP_COLUMNS = 64
"""What the feed-forward width is padded to a multiple of, for quantisers that work in groups of so many columns."""
_FEED_FORWARD_ROWS, _FEED_FORWARD_COLUMNS = ("gate_proj.weight", "up_proj.weight"), "down_proj.weight"


@dataclass(frozen=True)
class Subject:
    """A network and its text. `padded` has the same outputs and a feed-forward width that groups divide."""

    name: str
    folder: Path
    segments: Segments
    work: Path
    """Where everything that is made of it is kept."""
    is_padded: bool = False

    @property
    def is_tiny(self) -> bool:
        """Refining takes it so little time that it is done at every size."""
        return self.name.startswith(SMALL)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self.folder)

    @cached_property
    def weights(self) -> list[Weight]:
        """Every matrix that is decided: the blocks', the embedding, the head."""
        skeleton = self.checkpoint.skeleton()
        return list(architecture_of(skeleton).weights(skeleton))

    @cached_property
    def block_weights(self) -> list[Weight]:
        """The linears of the blocks, which is what most peers quantise."""
        return [weight for weight in self.weights if weight.block is not None]

    @cached_property
    def num_parameters(self) -> int:
        return sum(shape.numel() for shape, _ in self.checkpoint.tensors().values())

    @cached_property
    def reference(self) -> Reference:
        """The original's predictions on the report split."""
        return Reference.of(self.checkpoint.load(), self.segments.report)

    @cached_property
    def padded(self) -> Subject:
        """Itself where all rows are whole groups already."""
        if all(weight.shape[1] % GROUP_COLUMNS == 0 for weight in self.block_weights):
            return self
        folder = self.work / "padded"
        write_padded(self.folder, folder)
        return Subject(f"{self.name}, padded", folder, self.segments, self.work, is_padded=True)


def subjects(assets: Path | None, work: Path) -> Iterator[Subject]:
    """The embedded default, then those that `assets` has. Says which are skipped."""
    text = load(
        DATA,
        Checkpoint.open(MODEL).tokenizer(),
        length=LENGTH,
        num_calibration=NUM_CALIBRATION,
        num_search=NUM_SEARCH,
        num_report=NUM_REPORT,
    )
    yield Subject(EMBEDDED, MODEL, text, work / "embedded")
    missing = [name for name in (LARGE, SMALL) if assets is None or not (assets / name).is_dir()]
    if assets is None or missing:
        print(f"skipped: {' and '.join(missing)} (say ASSETS=FOLDER, a folder that has them)", flush=True)
        return
    stories = _stories(assets / LARGE)
    assert (assets / LARGE / "tokenizer.json").read_bytes() == (assets / SMALL / "tokenizer.json").read_bytes(), "one text for both"
    for name in (LARGE, SMALL):
        yield Subject(name, assets / name, stories, work / name)


def _stories(folder: Path) -> Segments:
    """From the token files that lie beside the network; drawn as `formats.py` draws them."""
    train, valid, test = (np.load(folder / f"{part}.npy") for part in ("train", "valid", "test"))
    starts = np.random.default_rng(1234).integers(0, len(train) - LENGTH, NUM_CALIBRATION)
    return Segments(
        calibration=torch.from_numpy(np.stack([train[i : i + LENGTH] for i in starts])).long(),
        search=_first(valid, NUM_SEARCH),
        report=_first(test, NUM_REPORT),
        description="TinyStories, the train, valid and test parts",
    )


def _first(tokens: np.ndarray, num_segments: int) -> Tensor:
    return torch.from_numpy(tokens[: num_segments * LENGTH].reshape(num_segments, LENGTH)).long()


def write_padded(folder: Path, output: Path) -> None:
    """Copy a Llama with its feed-forward widened by zeros to whole groups: the same function of the input.

    A gate and an up row of zeros make a hidden value of zero, and silu(0) * 0 = 0 meets a down column of zeros.
    """
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    width = settings["intermediate_size"]
    more = -width % GROUP_COLUMNS
    output.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.suffix in (".json", ".model") and file.name != "config.json":
            shutil.copyfile(file, output / file.name)
    (output / "config.json").write_text(json.dumps({**settings, "intermediate_size": width + more}, indent=2) + "\n", encoding="utf-8")
    pad: Callable[[Tensor, tuple[int, ...]], Tensor] = torch.nn.functional.pad
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        rows, columns = name.endswith(_FEED_FORWARD_ROWS), name.endswith(_FEED_FORWARD_COLUMNS)
        tensors[name] = pad(tensor, (0, more if columns else 0, 0, more if rows else 0)) if rows or columns else tensor
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
