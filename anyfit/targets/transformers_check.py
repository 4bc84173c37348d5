"""Whether a written folder is what it should be: read tensor by tensor, then loaded by transformers in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from anyfit.checkpoint import Source
from anyfit.core.config import Config
from anyfit.core.files import is_full
from anyfit.elastic.extracted import Extracted, InMemory
from anyfit.interface import interface_of
from anyfit.targets import transformers_reader
from anyfit.targets.base import Check
from anyfit.targets.hub_layout import DTYPES, Layout, Place
from anyfit.targets.safetensors_file import EMPTY_BYTES, Slot

OUTPUTS_BAR = 1e-4
"""Largest difference of an output. The weights are equal to the bit; threads may add them up in another order."""
PROBE = "def anyfit(x):\n    return 'ünïcode', [1, 2.5]\n"
"""What both tokenizers are asked to read."""


def checks(layout: Layout, path: Path, source: Source, config: Config, model: Extracted, tokens: Tensor) -> tuple[Check, ...]:
    """See `Target.check`. The later ones are left out where an earlier one fails."""
    chosen = [(layout.place(model.skeleton, weight), config.format(name)) for name, weight in model.weights.items()]
    try:
        audit = _audit(path, source, chosen)
        if audit.passed:
            values = _values(path, source, chosen, model)
            return audit, values, *(_loads(layout, path, source, chosen, model, tokens) if values.passed else ())
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


def _loads(
    layout: Layout, path: Path, source: Source, chosen: list[tuple[Place, str]], model: Extracted, tokens: Tensor
) -> tuple[Check, ...]:
    coded = any(name not in DTYPES for _, name in chosen)
    if coded and (missing := layout.lacks_runtime()):
        return (Check("transformers", True, f"skipped: {missing}"),)
    if problem := model.too_large():
        return (Check("transformers", True, f"skipped: {problem}"),)
    plugin = layout.needs.plugin if coded else ""
    found = read(path, source.config, tokens, layout.environment(), trust=source.trust_remote_code, plugin=plugin)
    if isinstance(found, Check):
        return (found,)
    names = [name for name, _ in model.skeleton.named_parameters(remove_duplicate=False)]
    return compare(*found, source, {name: model.parameter(name) for name in names}, model.outputs(tokens)(tokens))


def cut_checks(path: Path, source: Source, model: PreTrainedModel, tokens: Tensor) -> tuple[Check, ...]:
    """See `CutTarget.check_cut`. Where blocks differ the folder holds code of ours, which the reader is told to run."""
    found = read(path, source.config, tokens, {}, trust=source.trust_remote_code or any(path.glob("*.py")))
    if isinstance(found, Check):
        return (found,)
    expected = InMemory(model).outputs(tokens)(tokens)
    return compare(*found, source, dict(model.named_parameters(remove_duplicate=False)), expected)


def read(
    path: Path, config: PretrainedConfig, tokens: Tensor, environment: Mapping[str, str], *, trust: bool, plugin: str = ""
) -> tuple[Mapping[str, Any], Tensor] | Check:
    """What `transformers_reader.read` finds in another process with these settings besides, and what comes out for the tokens; a failed
    check where it doesn't load. `config`: the original's. `plugin`: a module that is imported first."""
    interface = interface_of(config)
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: tensor.contiguous() for name, tensor in interface.tensors(tokens).items()}, Path(folder, "in.safetensors"))
        probe = PROBE if interface.words else ""
        arguments = [str(path), f"{folder}/in.safetensors", f"{folder}/out", probe, str(torch.get_num_threads())]
        arguments += ["trust" if trust else "no", interface.auto, interface.output, *([plugin] if plugin else [])]
        # -P keeps anyfit's own folder, where the program lies, from being searched for modules
        command = [sys.executable, "-P", transformers_reader.__file__, *arguments]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
        if ran.returncode:
            last = (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1]
            return Check("transformers", False, f"from_pretrained failed: {last}")
        report = json.loads(Path(folder, "out.json").read_text(encoding="utf-8"))
        outputs = load_file(Path(folder, "out.safetensors"))["outputs"]
    assert plugin or not report["anyfit"], "the reader must not need anyfit"
    return report, outputs


def compare(
    report: Mapping[str, Any], outputs: Tensor, source: Source, parameters: Mapping[str, Tensor], expected: Tensor
) -> tuple[Check, ...]:
    """What was read, against the extracted model's `parameters` by name, what comes out of it, and the original's tokenizer."""
    own = {name: transformers_reader.digest(parameter) for name, parameter in parameters.items()}
    wrong = sorted(name for name, digest in own.items() if report["digests"].get(name) != digest)
    difference = float((expected - outputs).abs().max())
    interface = interface_of(source.config)
    complaints = "; ".join(f"{kind}: {', '.join(names[:5])}" for kind, names in report["complaints"].items())
    loaded = "loaded in another process, every parameter equal to the bit"
    tokenizers = (_same_tokens(report, source),) if interface.words else ()
    return (
        Check(
            "transformers", not wrong and not complaints, f"differ: {', '.join(wrong[:5])} {complaints}" if wrong or complaints else loaded
        ),
        Check(interface.output, difference <= OUTPUTS_BAR, f"largest difference {difference:.1e} (bar {OUTPUTS_BAR:.0e})"),
        *tokenizers,
    )


def _same_tokens(report: Mapping[str, Any], source: Source) -> Check:
    same = report["text"] == source.tokenizer()(PROBE)["input_ids"]
    return Check("tokenizer", same, "loads and reads a probe text as the original's does" if same else "reads a probe text otherwise")
