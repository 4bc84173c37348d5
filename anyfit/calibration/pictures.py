"""Pictures from files, as a network of pictures reads them: one size, with its own mean and spread of the colours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig

from anyfit.calibration.data import PURPOSES, Segments
from anyfit.core.errors import DataError, ModelError
from anyfit.interface import size

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SETTINGS = "preprocessor_config.json"
"""Where a model's folder says how pictures become numbers."""


def load(
    data: str | Path | Sequence[str | Path], folder: Path, config: PretrainedConfig, wanted: Mapping[str, int], *, seed: int
) -> Segments:
    """As many pictures for each purpose as are `wanted`, fewer where there are too few, drawn by `seed`; no file serves two purposes.

    `data`: picture files, and folders that are looked through for them. `folder`: the model's, of which `preprocessor_config.json`
    says the mean and the spread of each channel. Raises `DataError` for what is no picture, and where there aren't three.
    """
    files = _find(data)
    if len(files) < len(PURPOSES):
        for file in files:  # that one is no picture is what is told first
            read(file, folder, config)
        named = f"{len(files)} picture{'s' if len(files) > 1 else ''}"
        raise DataError(f"{named} can't serve three purposes, each of which needs its own.", remedy="Name more of them.")
    files = [files[index] for index in np.random.default_rng(seed).permutation(len(files)).tolist()]
    total, notes, start, drawn = sum(wanted.values()), [], 0, {}
    for place, (purpose, number) in enumerate(wanted.items()):
        left = len(wanted) - place - 1
        count = min(number, len(files) - start - left, max(1, len(files) * number // total))
        drawn[purpose] = torch.stack([read(file, folder, config) for file in files[start : start + count]])
        start += count
        if count < number:
            notes.append(f"there are {count} pictures for {purpose}, not {number}")
    return Segments(**drawn, description=f"{len(files)} pictures", notes=tuple(notes))


def held_out(data: str | Path | Sequence[str | Path], folder: Path, config: PretrainedConfig, number: int) -> tuple[Tensor, str]:
    """At most so many pictures for measuring only, (pictures, channels, height, width), with a description. Raises as `load` does."""
    files = _find(data)
    chosen = [files[index] for index in np.random.default_rng(0).permutation(len(files))[:number].tolist()]
    return torch.stack([read(file, folder, config) for file in chosen]), f"{len(chosen)} pictures"


def read(file: Path, folder: Path, config: PretrainedConfig) -> Tensor:
    """One picture, (channels, height, width) float32. Raises `DataError` for what isn't one."""
    height, width = size(config)
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB" if config.num_channels == 3 else "L").resize((width, height), Image.Resampling.BICUBIC)
    except Exception as error:  # which one a broken file raises is each image format's own affair
        raise DataError(f"{file} is no picture that can be read: {error}.", remedy="Leave it out, or save it as PNG.") from error
    values = torch.from_numpy(np.array(picture, np.float32)).reshape(height, width, -1).permute(2, 0, 1) / 255
    mean, std = _spread(folder, config.num_channels)
    return ((values - mean) / std).contiguous()


def _spread(folder: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (channels, 1, 1), of values from 0 to 1. Raises `ModelError` where the folder says
    none that are."""
    path = folder / SETTINGS
    try:
        said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        plain = said.get("do_normalize", True) is False
        given = (0.0, 1.0) if plain else tuple(0.5 if (own := said.get(name)) is None else own for name in ("image_mean", "image_std"))
        mean, std = (torch.tensor(own, dtype=torch.float32).expand(channels)[:, None, None] for own in given)
        if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
            raise ValueError("not finite, or a spread of nothing")
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"{path} has no image_mean and image_std of {channels} channels: {error}.", remedy="Mend it, or download the model again."
        ) from error
    return mean, std


def _find(data: str | Path | Sequence[str | Path]) -> list[Path]:
    found: list[Path] = []
    for item in [data] if isinstance(data, str | Path) else list(data):
        path = Path(item).expanduser()
        if not path.exists():
            raise DataError(f"There is no file or folder {path}.", remedy="Name pictures, or folders of them, with --data.")
        own = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not own:
            raise DataError(f"{path} has no pictures ({', '.join(SUFFIXES)}).", remedy="Name another folder.")
        found += own
    return list(dict.fromkeys(found))
