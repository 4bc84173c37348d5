"""Pictures from files, as a network of pictures reads them: one size, with its own mean and spread of the colours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import PretrainedConfig

from anyfit.calibration.data import PURPOSES, Segments
from anyfit.core.errors import DataError
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
        raise DataError(f"There are {len(files)} pictures, and each of three purposes needs its own.", remedy="Name more of them.")
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
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{file} is no picture that can be read: {error}.", remedy="Leave it out, or save it as PNG.") from error
    values = torch.from_numpy(np.array(picture, np.float32)).reshape(height, width, -1).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(own).reshape(-1, 1, 1) for own in _spread(folder, config.num_channels))
    return ((values - mean) / std).contiguous()


def _spread(folder: Path, channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of values from 0 to 1."""
    path = folder / SETTINGS
    said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if said.get("do_normalize", True) is False:
        return [0.0] * channels, [1.0] * channels
    half = [0.5] * channels
    return list(said.get("image_mean") or half), list(said.get("image_std") or half)


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
