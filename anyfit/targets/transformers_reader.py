"""A program of its own, run without anyfit: load a folder as anyone would, and say what came of it.

Usage: python transformers_reader.py FOLDER INPUTS OUTPUT TEXT THREADS TRUST AUTO ANSWER [PLUGIN]. INPUTS is a safetensors file with
what the network reads, by name, TRUST "trust" or anything else, AUTO transformers' class that loads it, ANSWER what that calls what comes
out, PLUGIN a module to import first. Writes OUTPUT.safetensors (`outputs`) and
OUTPUT.json: a hash of each parameter, the tokens of TEXT unless it is empty, the names that the loader missed or had left over, and whether
anyfit was imported.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer


def digest(tensor: Tensor) -> str:
    """Hash of the values in float32. Zero has two signs; adding zero leaves one."""
    values = (tensor.detach().float() + 0.0).contiguous()
    return hashlib.sha256(values.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def additive(model: nn.Module) -> dict[str, str]:
    """Hashes of the matrices that are kept in codebooks, by the names that their parameters had. To be asked for before the model runs: on
    a CPU the package then changes the order of its codes."""
    found = {}
    for path, module in model.named_modules():
        if type(module).__module__ == "aqlm.inference":
            from aqlm.utils import _dequantize_weight, unpack_int_data

            codes = unpack_int_data(module.codes.data, module.nbits_per_codebook)
            found[f"{path}.weight"] = digest(_dequantize_weight(codes, module.codebooks, module.scales))
    return found


def read(
    folder: str | Path,
    inputs: Mapping[str, Tensor],
    text: str,
    *,
    trust_remote_code: bool,
    auto: str = "AutoModelForCausalLM",
    answer: str = "logits",
) -> tuple[dict[str, Any], Tensor]:
    """Load a folder in float32: (what is found, what comes out for the inputs)."""
    model, found = getattr(transformers, auto).from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    digests = additive(model)
    with torch.no_grad():
        outputs = getattr(model.eval()(**inputs), answer)
    report = {
        "digests": digests | {name: digest(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)},
        "text": _tokens(folder, text, trust_remote_code=trust_remote_code) if text else [],
        "complaints": {kind: sorted(map(str, names)) for kind, names in found.items() if names},
        "anyfit": any(name.partition(".")[0] == "anyfit" for name in sys.modules),
    }
    return report, outputs


def _tokens(folder: str | Path, text: str, *, trust_remote_code: bool) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    found: list[int] = tokenizer(text)["input_ids"]
    return found


def main(folder: str, inputs: str, output: str, text: str, threads: str, trust: str, auto: str, answer: str, *plugins: str) -> None:
    for plugin in plugins:
        importlib.import_module(plugin)
    torch.set_num_threads(int(threads))
    report, outputs = read(folder, load_file(inputs), text, trust_remote_code=trust == "trust", auto=auto, answer=answer)
    save_file({"outputs": outputs.contiguous()}, f"{output}.safetensors")
    Path(f"{output}.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
