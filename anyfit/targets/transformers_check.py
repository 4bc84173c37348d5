"""Whether a written folder is what it should be: read tensor by tensor, then loaded by transformers in another process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyfit.checkpoint import Source
from anyfit.core.config import Config
from anyfit.core.files import is_full
from anyfit.elastic.extracted import Extracted
from anyfit.targets import compressed_tensors, transformers_reader
from anyfit.targets.base import Check
from anyfit.targets.compressed_tensors import DTYPES, Place
from anyfit.targets.safetensors_file import EMPTY_BYTES, Slot

PLUGIN = "anyfit.transformers_plugin"
"""What is imported before a folder with tables is loaded."""
LOGITS_BAR = 1e-4
"""Largest difference of a logit. The weights are equal to the bit; threads may add them up in another order."""
PROBE = "def anyfit(x):\n    return 'ünïcode', [1, 2.5]\n"
"""What both tokenizers are asked to read."""


def checks(path: Path, source: Source, config: Config, model: Extracted, tokens: Tensor) -> tuple[Check, ...]:
    """See `Target.check`. The later ones are left out where an earlier one fails."""
    chosen = [(compressed_tensors.place(model.skeleton, weight), config.format(name)) for name, weight in model.weights.items()]
    try:
        audit = _audit(path, source, chosen)
        if audit.passed:
            values = _values(path, source, chosen, model)
            return audit, values, *(_loads(path, source, chosen, model, tokens) if values.passed else ())
    except (SafetensorError, OSError) as error:
        if is_full(error):
            raise
        audit = Check("tensors", False, f"{path} can't be read: {error}")
    return (audit,)


def _audit(path: Path, source: Source, chosen: list[tuple[Place, str]]) -> Check:
    """Each tensor once, of the right type and shape, and the files exactly as long as that makes them."""
    expected = {name: Slot.of(name, tensor) for name, tensor in source.passthrough.items()}
    expected |= {slot.name: slot for held, name in chosen for slot in held.slots(name)}
    files = sorted(path.glob("*.safetensors"))
    found: dict[str, Slot] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict: it has no iterator of its own)
                if name in found:
                    return Check("tensors", False, f"{name} is stored twice")
                found[name] = Slot.of(name, opened.get_tensor(name))
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        return Check("tensors", False, f"{len(wrong)} tensors are missing, left over, or of another type or shape: {', '.join(wrong[:5])}")
    predicted = len(files) * EMPTY_BYTES + sum(slot.bytes_ for slot in expected.values())
    size = sum(file.stat().st_size for file in files)
    return Check("tensors", size == predicted, f"{len(found)} tensors, each once; {size} bytes where {predicted} were predicted")


def _values(path: Path, source: Source, chosen: list[tuple[Place, str]], model: Extracted) -> Check:
    """Each tensor, read and decoded, against the extracted model's."""
    files: dict[str, Path] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)

    def read(name: str) -> Tensor:
        with safe_open(files[name], framework="pt") as opened:
            return opened.get_tensor(name)

    wrong = [name for name, tensor in source.passthrough.items() if not torch.equal(read(name), tensor)]
    for held, name in chosen:
        tensors = {slot.name: read(slot.name) for slot in held.slots(name)}
        if not torch.equal(held.decode(name, tensors), model.parameter(held.weight.name)):
            wrong.append(held.weight.name)
    detail = f"not the extracted model's: {', '.join(wrong[:5])}" if wrong else "every tensor equals the extracted model's to the bit"
    return Check("values", not wrong, detail)


def _loads(path: Path, source: Source, chosen: list[tuple[Place, str]], model: Extracted, tokens: Tensor) -> tuple[Check, ...]:
    tables = any(name.startswith("table") for _, name in chosen)
    if not tables and any(name not in DTYPES for _, name in chosen) and (missing := lacks_runtime()):
        return (Check("transformers", True, f"skipped: {missing}"),)
    if problem := model.too_large():
        return (Check("transformers", True, f"skipped: {problem}"),)
    with tempfile.TemporaryDirectory() as folder:
        save_file({"tokens": tokens.contiguous()}, Path(folder, "tokens.safetensors"))
        arguments = [str(path), f"{folder}/tokens.safetensors", f"{folder}/out", PROBE, str(torch.get_num_threads())]
        arguments += ["trust" if source.trust_remote_code else "no", *([PLUGIN] if tables else [])]
        # -P keeps anyfit's own folder, where the program lies, from being searched for modules
        command = [sys.executable, "-P", transformers_reader.__file__, *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            last = (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1]
            return (Check("transformers", False, f"from_pretrained failed: {last}"),)
        report = json.loads(Path(folder, "out.json").read_text(encoding="utf-8"))
        logits = load_file(Path(folder, "out.safetensors"))["logits"]
    assert tables or not report["anyfit"], "the reader must not need anyfit"
    return compare(report, logits, source, model, tokens)


def compare(report: Mapping[str, Any], logits: Tensor, source: Source, model: Extracted, tokens: Tensor) -> tuple[Check, ...]:
    """What `transformers_reader.read` found, against the extracted model and the original's tokenizer."""
    names = [name for name, _ in model.skeleton.named_parameters(remove_duplicate=False)]
    own = {name: transformers_reader.digest(model.parameter(name)) for name in names}
    wrong = sorted(name for name, digest in own.items() if report["digests"].get(name) != digest)
    difference = float((model.logits(tokens)(tokens) - logits).abs().max())
    same_tokens = report["text"] == source.tokenizer()(PROBE)["input_ids"]
    complaints = "; ".join(f"{kind}: {', '.join(names[:5])}" for kind, names in report["complaints"].items())
    loaded = "loaded in another process, every parameter equal to the bit"
    return (
        Check(
            "transformers", not wrong and not complaints, f"differ: {', '.join(wrong[:5])} {complaints}" if wrong or complaints else loaded
        ),
        Check("logits", difference <= LOGITS_BAR, f"largest difference {difference:.1e} (bar {LOGITS_BAR:.0e})"),
        Check(
            "tokenizer",
            same_tokens,
            "loads and reads a probe text as the original's does" if same_tokens else "reads a probe text otherwise",
        ),
    )


def lacks_runtime() -> str | None:
    """What to install before a folder with integers can be loaded; None where it is there."""
    needed = f"compressed-tensors>={compressed_tensors.VERSION}"
    install = "pip install 'anyfit[compressed]'"
    try:
        installed = version("compressed-tensors")
    except PackageNotFoundError:
        return f"loading integers needs {needed}, which is not installed; {install}"
    if Version(installed) < Version(compressed_tensors.VERSION):
        return f"loading these integers needs {needed}, and {installed} is installed; {install}"
    return None
