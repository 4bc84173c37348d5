"""The ResNet-20 for CIFAR-10 (He et al., option A), and the pictures: small enough to train on two cores."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

WIDTHS, BLOCKS = (16, 32, 64), 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.step = 1 if inputs == outputs else 2
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, self.step, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.step == 2:
            quarter = out.shape[1] // 4
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
        return functional.relu(out + x)


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False), nn.BatchNorm2d(WIDTHS[0])
        inputs = (WIDTHS[0], *WIDTHS)
        for number, outputs in enumerate(WIDTHS):
            blocks = [Block(inputs[number] if index == 0 else outputs, outputs) for index in range(BLOCKS)]
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(WIDTHS[-1], 10)

    def forward(self, pictures: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(pictures)))
        for number in range(len(WIDTHS)):
            x = self.get_submodule(f"layer{number + 1}")(x)
        return self.linear(x.mean((2, 3)))

    @property
    def inner(self) -> list[str]:
        """Every convolution but the first: first and last layer stay as they are, as in the paper."""
        return [name for name, module in self.named_modules() if isinstance(module, nn.Conv2d) and name != "conv1"]


def trained(assets: Path) -> ResNet20:
    """With the weights that its authors trained."""
    model = ResNet20()
    model.load_state_dict(load_file(assets / "cifar10-resnet" / "resnet20.safetensors"), strict=False)
    return model.eval()


def pictures(assets: Path, split: str, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """(pictures, 3, 32, 32), normalised, and their labels, in an order drawn by `seed`."""
    (path,) = (assets / "cifar10").glob(f"cifar10_{split}_jpeg_*.npz")
    file = np.load(path)
    blob, offsets, labels = file["blob"], file["offsets"], file["labels"]
    order = np.random.default_rng(seed).permutation(len(labels))[:most]
    found = np.stack([np.asarray(Image.open(io.BytesIO(blob[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB")) for i in order])
    scaled = torch.from_numpy(found).float().div_(255).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (MEAN, STD))
    return ((scaled - mean) / std).contiguous(), torch.from_numpy(labels[order].astype(np.int64))


def augmented(some: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored by halves, and moved by up to four pixels."""
    mirrored = torch.where(torch.rand(len(some), 1, 1, 1, generator=generator) < 0.5, some.flip(3), some)
    padded = functional.pad(mirrored, (4, 4, 4, 4))
    right, down = torch.randint(9, (2, len(some)), generator=generator).tolist()
    return torch.stack([picture[:, y : y + 32, x : x + 32] for picture, x, y in zip(padded, right, down, strict=True)])


@torch.no_grad()
def accuracy(model: nn.Module, some: Tensor, labels: Tensor) -> float:
    """In percent."""
    was, _ = model.training, model.eval()
    right = sum(int((model(part).argmax(1) == wanted).sum()) for part, wanted in zip(some.split(500), labels.split(500), strict=True))
    model.train(was)
    return 100 * right / len(labels)
