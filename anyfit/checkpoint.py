"""The network that goes in: a Hugging Face folder, checked before any long work starts."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from anyfit import network
from anyfit.core.errors import ModelError
from anyfit.core.files import sha256
from anyfit.core.units import Weight
from anyfit.network import read_config
from anyfit.progress import Progress, Silent
from anyfit.zoo import MODEL

__all__ = ["Checkpoint", "Source", "read_config"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CONVERT = (
    "Convert it once with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), "
    "then AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
)
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
)
_CONFIG_FILES = ("config.json", "generation_config.json", "preprocessor_config.json")
_ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class Source:
    """What is left of the original in a family, enough to write any of its models.

    `folder` holds config.json and every file that travels with a model (tokenizer, chat template, generation
    config, and remote code where the caller allowed it). `passthrough` are the parameters that nobody decides
    about (norms, biases), by checkpoint name, in the checkpoint's own type and orientation. `tied` maps every
    other name of a shared tensor to the one that is stored. `original_bytes`: the original's weight files.
    """

    folder: Path
    config: PretrainedConfig
    passthrough: dict[str, Tensor]
    tied: dict[str, str] = field(default_factory=dict)
    original_bytes: int = 0
    trust_remote_code: bool = False

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The original's tokenizer, read once. Raises `ModelError` where it is missing or has more tokens than the model."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return network.read_tokenizer(self.folder, self.config, trust_remote_code=self.trust_remote_code)

    def skeleton(self) -> PreTrainedModel:
        """The network on the meta device: names, shapes and ties, no numbers."""
        return network.skeleton(self.config, trust_remote_code=self.trust_remote_code)

    def frame(self) -> PreTrainedModel:
        """The network without its numbers, but with the buffers that no file stores."""
        return network.frame(self.config, trust_remote_code=self.trust_remote_code)

    def tensors(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and stored type of every tensor that passes through."""
        return {name: (tensor.shape, tensor.dtype) for name, tensor in self.passthrough.items()}

    def read(self, name: str) -> Tensor:
        """One of them in its stored type, by any of its parameter names."""
        return self.passthrough[self.tied.get(name, name)]

    def build(self, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The network with these decided weights, by parameter name and in the checkpoint's orientation.

        Ready to run: in evaluation mode, ties restored, no gradients. It may share memory with `weights`.
        """
        tensors = {name: tensor.clone() for name, tensor in self.passthrough.items()} | dict(weights)
        return network.assemble(self.skeleton(), self.folder, tensors, dtype)


@dataclass(frozen=True)
class Stored:
    """One tensor as the header of its file describes it. `name` is its name in the file."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None for a type that isn't floating point of 16 bits or more."""


@dataclass(frozen=True)
class Checkpoint:
    """The original: its folder, what it is made of, and its numbers when they are asked for.

    `name` is what a person calls it: the hub's name, or the folder's. `files` are the weight files. Tensors go by
    the network's own parameter names, whatever the file calls them; one with several names goes by the first in
    the order of the network, and `tied` maps the others to it.
    """

    name: str
    folder: Path
    config: PretrainedConfig
    files: tuple[Path, ...]
    tied: dict[str, str]
    unused: tuple[str, ...]
    """Stored tensors that the network has no place for, by their name in the file."""
    trust_remote_code: bool
    _stored: dict[str, Stored]

    @classmethod
    def open(cls, model: str | Path, *, trust_remote_code: bool = False) -> Checkpoint:
        """Look at a local folder, or at `organisation/name` of the Hugging Face hub where no such folder exists.

        Only headers are read (and the values of tensors that are stored twice though the config ties them).
        Raises `ModelError` for everything that would stop a later stage: see `check_finite` for the rest.
        """
        folder = _folder(model, trust_remote_code)
        config = read_config(folder, trust_remote_code=trust_remote_code)
        files = _weight_files(folder)
        headers = {stored.name: stored for file in files for stored in _header(file)}
        tensors, tied, unused = _match(network.skeleton(config, trust_remote_code=trust_remote_code), headers, folder)
        name = str(model) if not Path(model).expanduser().exists() else "pystdlib-llama" if folder == MODEL else folder.resolve().name
        return cls(name, folder, config, files, tied, unused, trust_remote_code, tensors)

    @property
    def embedded(self) -> bool:
        """Whether this is the default that comes with the package."""
        return self.folder.resolve() == MODEL.resolve()

    @property
    def bytes_(self) -> int:
        """Size of the weight files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def dtype(self) -> torch.dtype:
        """The type that most of the numbers are stored in."""
        counts: Counter[torch.dtype] = Counter()
        for shape, dtype in self.tensors().values():
            counts[dtype] += shape.numel()
        return counts.most_common(1)[0][0]

    @cached_property
    def digest(self) -> str:
        """Hash of the content of the weights and of every file that travels with them, wherever the folder lies."""
        content = hashlib.sha256()
        for path in sorted({*self.files, *self.travelling_files()}):
            content.update(f"{path.name}\n{sha256(path)}\n".encode())
        return content.hexdigest()

    def tensors(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and stored type of every tensor of the network, each shared one once, in the network's order."""
        return {name: (torch.Size(stored.shape), stored.dtype) for name, stored in self._stored.items() if stored.dtype}

    def read(self, name: str) -> Tensor:
        """One tensor in its stored type and orientation, by any of its parameter names. Mapped, not copied."""
        stored = self._stored[self.tied.get(name, name)]
        with safe_open(stored.file, framework="pt") as file:
            return file.get_tensor(stored.name)

    def check_finite(self, progress: Progress | None = None) -> None:
        """Read every number once. Raises `ModelError` for the first tensor that holds a NaN or an infinity."""
        with (progress or Silent()).stage("reading the weights", len(self._stored)) as stage:
            for name, stored in self._stored.items():
                bad = sum(int((~rows.isfinite()).sum()) for rows in self._rows(stored))
                if bad:
                    raise ModelError(
                        f"{name} in {stored.file.name} holds {bad} values that are NaN or infinite.",
                        remedy="The file is damaged or the training diverged: fetch or save the model again.",
                    )
                stage.advance(detail=name)

    def skeleton(self) -> PreTrainedModel:
        """The network on the meta device: names, shapes and ties, no numbers."""
        return network.skeleton(self.config, trust_remote_code=self.trust_remote_code)

    def frame(self) -> PreTrainedModel:
        """The network without its numbers, but with the buffers that no file stores."""
        return network.frame(self.config, trust_remote_code=self.trust_remote_code)

    def load(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The original, ready to run: in evaluation mode, without gradients."""
        return network.assemble(self.skeleton(), self.folder, {name: self.read(name) for name in self._stored}, dtype)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises `ModelError` where it is missing or has more tokens than the model."""
        return network.read_tokenizer(self.folder, self.config, trust_remote_code=self.trust_remote_code)

    def source(self, weights: Iterable[Weight]) -> Source:
        """The original without these weights, which are decided about; everything else passes through."""
        decided = {weight.name for weight in weights}
        passthrough = {name: self.read(name) for name in self._stored if name not in decided}
        return Source(self.folder, self.config, passthrough, self.tied, self.bytes_, self.trust_remote_code)

    def travelling_files(self) -> list[Path]:
        """What a family needs a copy of so that its models run: config, tokenizer, chat template, allowed code."""
        code = ("*.py",) if self.trust_remote_code else ()
        return _existing(self.folder, (*_CONFIG_FILES, *_TOKENIZER_FILES, *code))

    def _rows(self, stored: Stored) -> Iterator[Tensor]:
        with safe_open(stored.file, framework="pt") as file:
            if not stored.shape:
                yield file.get_tensor(stored.name)
                return
            rows = file.get_slice(stored.name)
            for start in range(0, stored.shape[0], _ROWS_AT_A_TIME):
                yield rows[start : start + _ROWS_AT_A_TIME]


def _folder(model: str | Path, trust_remote_code: bool) -> Path:
    path = Path(model).expanduser()
    if path.exists():
        if not path.is_dir():
            raise ModelError(f"{model} is a file.", remedy="Name the folder that holds config.json and the weights.")
        if not any(path.iterdir()):
            raise ModelError(f"The folder {model} is empty.", remedy="Name the folder that holds config.json and the weights.")
        return path
    if isinstance(model, str) and _HUB_ID.fullmatch(model):
        return _download(model, trust_remote_code)
    raise ModelError(
        f"There is no folder {model}.",
        remedy="Name a folder with config.json and safetensors weights, or a model of the Hugging Face hub as organisation/name.",
    )


def _download(name: str, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["model*.safetensors", INDEX, *_CONFIG_FILES, *_TOKENIZER_FILES]
    try:
        return Path(snapshot_download(name, allow_patterns=[*patterns, "*.py"] if trust_remote_code else patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name} is neither a folder nor a model that can be reached on the Hugging Face hub ({reason})",
            remedy="Check the name and the connection, or give a local folder.",
        ) from error


def _existing(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _weight_files(folder: Path) -> tuple[Path, ...]:
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    if others:
        raise ModelError(f"{folder} has weights only as {others[0]}, a pickle, which is never opened.", remedy=_CONVERT)
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} holds an adapter, not a network.", remedy="Merge it into its base model with peft's merge_and_unload.")
    raise ModelError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}.", remedy=f"Download the rest of the model. {_CONVERT}")


def _indexed_files(folder: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{folder / INDEX} can't be read: no JSON with a weight_map.", remedy="Download it again.") from error
    outside = [name for name in names if Path(name).name != name]
    if outside or not names:
        raise ModelError(f"{folder / INDEX} names no file of its own folder: {outside}.", remedy="Download it again.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks weight files that {INDEX} names: {', '.join(missing)}.", remedy="Download them.")
    return tuple(folder / name for name in names)


def _header(file: Path) -> Iterator[Stored]:
    """Opening checks that the header is whole and that the file is exactly as long as the header says."""
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict: it has no iterator of its own)
                entry = opened.get_slice(name)
                yield Stored(name, file, tuple(entry.get_shape()), _DTYPES.get(entry.get_dtype()))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is truncated or damaged ({error}).", remedy="Download or save it again.") from error


def _match(model: PreTrainedModel, headers: dict[str, Stored], folder: Path) -> tuple[dict[str, Stored], dict[str, str], tuple[str, ...]]:
    """Each of the network's tensors with the stored one: (by first name, other name to first name, left over)."""
    by_parameter, unused = _by_parameter(model, headers, folder)
    tensors: dict[str, Stored] = {}
    tied: dict[str, str] = {}
    missing, misshapen = [], []
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for names, tensor in _shared(model):
        tied |= dict.fromkeys(names[1:], names[0])
        found = [by_parameter[name] for name in names if name in by_parameter]
        if found:
            _check_copies(found, folder)
            tensors[names[0]] = found[0]
            if found[0].shape != tuple(tensor.shape):
                misshapen.append(f"{names[0]} is {list(found[0].shape)}, not {list(tensor.shape)}")
        elif names[0] in parameters and not _ignored(names[0], model._keys_to_ignore_on_load_missing):
            missing.append(names[0])
    _refuse(f"{folder} lacks tensors that {type(model).__name__} has", missing)
    _refuse(f"{folder} holds tensors of another shape than its config.json says", misshapen)
    _refuse(f"{folder} is quantised already", [name for name, stored in tensors.items() if stored.dtype is None])
    return tensors, tied, unused


def _by_parameter(model: PreTrainedModel, headers: dict[str, Stored], folder: Path) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """The stored tensors by the network's own names, and the names of those that it has no place for."""
    names = network.parameter_names(model, headers)
    rearranged = [name for name, parameter in names.items() if parameter is None]
    if rearranged:
        raise ModelError(
            f"{folder} stores tensors that {type(model).__name__} merges or splits on loading, such as {rearranged[0]}.",
            remedy="This version handles networks whose weights are stored as they are used.",
        )
    known = model.state_dict()
    unused = (name for name, parameter in names.items() if parameter not in known)
    found = {parameter: headers[name] for name, parameter in names.items() if parameter is not None and parameter in known}
    return found, tuple(name for name in unused if not _ignored(name, model._keys_to_ignore_on_load_unexpected))


def _shared(model: PreTrainedModel) -> list[tuple[list[str], Tensor]]:
    """Every stored tensor of the network with all its names, in the order of the network."""
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(groups.values())


def _check_copies(copies: list[Stored], folder: Path) -> None:
    """A tensor that the config ties may be stored twice, but only with the same values."""
    first = copies[0]
    for other in copies[1:]:
        with safe_open(first.file, framework="pt") as a, safe_open(other.file, framework="pt") as b:
            if other.shape != first.shape or not torch.equal(a.get_tensor(first.name), b.get_tensor(other.name)):
                raise ModelError(
                    f"{folder} stores {first.name} and {other.name} with different values, though its config ties them.",
                    remedy="If they are meant to differ, set tie_word_embeddings to false in config.json.",
                )


def _ignored(name: str, patterns: set[str] | list[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in [*(patterns or ()), r"rotary_emb\.inv_freq$"])


def _refuse(problem: str, found: list[str]) -> None:
    if found:
        listed = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise ModelError(f"{problem}: {listed}.", remedy="Use a complete, unquantised checkpoint that fits its config.json.")
