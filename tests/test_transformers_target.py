"""The transformers target: exact sizes, the same bytes twice, and folders that transformers itself reads to the bit."""

from __future__ import annotations

import json
import random
import zlib
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import anyfit.transformers_plugin  # noqa: F401  (for what it registers)
from anyfit import streaming
from anyfit.architectures import architecture_of
from anyfit.checkpoint import Checkpoint, Source
from anyfit.core.config import Config
from anyfit.core.errors import UnknownNameError, UserError
from anyfit.core.files import sha256
from anyfit.core.space import Space
from anyfit.core.units import Weight
from anyfit.elastic.extracted import Extracted
from anyfit.family.store import Decoder
from anyfit.formats import formats
from anyfit.formats.base import CastFormat, Scales
from anyfit.formats.table import TableFormat
from anyfit.network import quiet
from anyfit.targets import compressed_tensors, row_tables, safetensors_file, transformers_check, transformers_reader
from anyfit.targets.base import ALL
from anyfit.targets.compressed_tensors import LAYOUT
from anyfit.targets.hub_layout import DTYPES
from anyfit.targets.safetensors_file import EMPTY_BYTES, Slot, shards, write_file
from anyfit.targets.transformers import TARGET, write_dense
from anyfit.testing.models import save_tiny

MISSING = LAYOUT.lacks_runtime()
needs_runtime = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
KINDS = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gpt2": {},
    "opt": {},
    "phi3": {},
    "gemma2": {},
    "falcon": {},
}
TABLES, INTEGERS = row_tables.LAYOUT.formats, LAYOUT.formats
MIXABLE = [*DTYPES, *INTEGERS]
"""What one folder can have."""


@dataclass(frozen=True)
class Network:
    """A tiny network with made-up variants: random codes and scales of both signs."""

    source: Source
    weights: tuple[Weight, ...]
    space: Space

    def variant(self, weight: str, name: str, which: Tensor | slice = ALL) -> Tensor:
        return formats.get(name).rows(self.whole(weight, name), which)

    def whole(self, weight: str, name: str) -> Tensor:
        shape = next(w.shape for w in self.weights if w.name == weight)
        rng = torch.Generator().manual_seed(zlib.crc32(f"{weight} {name}".encode()))
        format_ = formats.get(name)
        if isinstance(format_, CastFormat):
            return format_.encode(0.02 * torch.randn(shape, generator=rng))
        if isinstance(format_, TableFormat):
            codes = torch.randint(0, 2**format_.num_bits, shape, generator=rng, dtype=torch.uint8)
            return format_.pack(codes, (0.02 * torch.randn(shape[0], format_.entries, generator=rng)).half())
        groups = (shape[0], shape[1] // format_.group)
        codes = torch.randint(0, len(format_.levels), shape, generator=rng, dtype=torch.uint8)
        scale = (0.1 * torch.randn(groups, generator=rng) / len(format_.levels)).half()
        zero = torch.randint(0, len(format_.levels), groups, generator=rng, dtype=torch.uint8)
        return format_.pack(codes, Scales(scale.float(), zero * scale.float(), {"scale": scale, "zero": zero}))

    def config(self, seed: int) -> Config:
        rng = random.Random(seed)
        return Config({d.key: rng.choice(d.choices).name for d in self.space.decisions})

    def decoded(self, config: Config) -> dict[str, Tensor]:
        values = {w.name: formats.get(config.format(w.name)).decode(self.variant(w.name, config.format(w.name))) for w in self.weights}
        return {w.name: values[w.name].T.contiguous() if w.transposed else values[w.name] for w in self.weights}

    def extracted(self, config: Config, folder: Path) -> Extracted:
        return Extracted(self.source, config, Decoder(self.variant, TARGET, self.source), folder / "states")

    def write(self, path: Path, config: Config) -> int:
        return TARGET.write(path, self.source, self.space, config, self.variant)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Networks by the names of `KINDS`, each made once."""

    @cache
    def made(kind: str) -> Network:
        folder = save_tiny(tmp_path_factory.mktemp("tiny") / "model", kind.partition(",")[0], **KINDS[kind])
        skeleton = Checkpoint.open(folder).skeleton()
        weights = tuple(architecture_of(skeleton).weights(skeleton))
        source = Checkpoint.open(folder).source(weights)
        return Network(source, weights, TARGET.space(source, weights, MIXABLE))

    return made


def tokens() -> Tensor:
    return torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(0))


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in folder.iterdir()}


def read_here(path: Path, source: Source, model: Extracted) -> list[str]:
    """What transformers' own loader finds wrong with a folder, in this process because starting one takes seconds."""
    with quiet():
        report, logits = transformers_reader.read(path, {"input_ids": tokens()}, transformers_check.PROBE, trust_remote_code=False)
    parameters = {name: model.parameter(name) for name, _ in model.skeleton.named_parameters(remove_duplicate=False)}
    checks = transformers_check.compare(report, logits, source, parameters, model.outputs(tokens())(tokens()))
    return [f"{check.name}: {check.detail}" for check in checks if not check.passed]


@pytest.mark.parametrize("kind", KINDS)
def test_every_config_takes_exactly_the_bytes_that_were_predicted(network, kind, tmp_path):
    net = network(kind)
    configs = [net.config(seed) for seed in range(2)] + [net.space.smallest(), net.space.largest()]
    for index, config in enumerate(configs):
        written = net.write(tmp_path / str(index), config)
        assert written == weight_bytes(tmp_path / str(index)) == net.space.bytes_(config)


@pytest.mark.parametrize("kind", KINDS)
def test_what_files_are_compared_with_is_the_extracted_model(network, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "ROWS_AT_ONCE", 100)
    net = network(kind)
    config = net.config(seed=7)
    model, found = net.source.build(net.decoded(config)), net.extracted(config, tmp_path)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(found.parameter(name), parameter)
        assert torch.equal(torch.cat([rows for _, rows in found.rows(name)]), parameter)
    with torch.no_grad():
        assert torch.equal(found.outputs(tokens())(tokens()), model(tokens()).logits)


@needs_runtime
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_every_kind_to_the_bit(network, kind, tmp_path):
    net = network(kind)
    config = net.config(seed=4)
    net.write(tmp_path / "folder", config)
    assert read_here(tmp_path / "folder", net.source, net.extracted(config, tmp_path)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_tables_in_every_kind_to_the_bit(network, kind, tmp_path):
    net = network(kind)
    net = replace(net, space=TARGET.space(net.source, net.weights, ("F16", *TABLES)))
    for seed in range(2):
        config, folder = net.config(seed), tmp_path / str(seed)
        assert len(set(config.formats.values())) > 2
        assert net.write(folder, config) == weight_bytes(folder) == net.space.bytes_(config)
        assert read_here(folder, net.source, net.extracted(config, tmp_path)) == []


def test_tables_that_rows_are_too_short_for_are_refused(network):
    net = network("llama")
    for decision in TARGET.space(net.source, net.weights, ("F16", *TABLES)).decisions:
        (weight,) = decision.unit.weights
        for name in TABLES:
            bytes_ = sum(slot.data_bytes for slot in row_tables.LAYOUT.place(net.source.skeleton(), weight).slots(name))
            assert (name in decision.refused) == (bytes_ >= 2 * weight.num_weights)
        finest = max(set(TABLES) - decision.refused.keys())
        assert all("no fewer bytes" in why and f"{finest} takes its place" in why for why in decision.refused.values())
        assert "table2" not in decision.refused and "table8" in decision.refused


@pytest.mark.parametrize("names", [("int4_sym", "F16", "table3"), ("table3", "table4", "aqlm_1x8g4"), ("aqlm_1x8g8", "aqlm_1x8g4")])
def test_formats_of_two_layouts_are_refused(network, names):
    net = network("llama")
    with pytest.raises(UserError, match=rf"{names[0]} and {names[-1]}: one package.*--formats {names[0]}.*,F16"):
        TARGET.space(net.source, net.weights, names)


@needs_runtime
def test_a_table_in_8_bits_is_read_to_the_bit_with_and_without_a_tied_head(network, tmp_path):
    for kind in ("llama", "llama, tied", "gpt2"):
        net = network(kind)
        for name in ("int8_sym", "int8_asym"):
            table = net.space.decisions[0].unit.name
            config = Config.of_formats({**net.config(seed=5).formats, table: name})
            net.write(tmp_path / f"{kind} {name}", config)
            assert read_here(tmp_path / f"{kind} {name}", net.source, net.extracted(config, tmp_path)) == []


@needs_runtime
@pytest.mark.parametrize("name", INTEGERS)
def test_packed_words_are_those_of_compressed_tensors(network, name):
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    net = network("llama")
    weight = net.weights[2]
    format_, held = formats.get(name), LAYOUT.place(net.source.skeleton(), weight)
    data = net.variant(weight.name, name)
    tensors = held.tensors(name, data)
    assert {Slot.of(key, tensor) for key, tensor in tensors.items()} == set(held.slots(name))
    codes = unpack_from_int32(tensors[f"{held.modules[0]}.weight_packed"], format_.num_bits, weight.shape)
    zero = tensors.get(f"{held.modules[0]}.weight_zero_point", torch.zeros(1, 1))
    scale = tensors[f"{held.modules[0]}.weight_scale"]
    values = (codes.float().unflatten(1, (-1, format_.group)) - zero.float().unsqueeze(-1)) * scale.float().unsqueeze(-1)
    assert torch.equal(values.flatten(1), format_.decode(data))
    assert torch.equal(held.decode(name, tensors), format_.decode(data))


def test_the_same_config_gives_the_same_bytes(network, tmp_path):
    net = network("opt")
    for folder in ("a", "b"):
        net.write(tmp_path / folder, net.config(seed=1))
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_check_loads_the_folder_in_a_process_without_anyfit(network, tmp_path):
    net = network("llama, tied")
    space = TARGET.space(net.source, net.weights, INTEGERS if MISSING is None else ["BF16"])
    config = Config({d.key: d.choices[-1].name for d in space.decisions})
    TARGET.write(tmp_path / "folder", net.source, space, config, net.variant)
    checks = TARGET.check(tmp_path / "folder", net.source, config, net.extracted(config, tmp_path), tokens())
    assert [check.name for check in checks] == ["tensors", "values", "transformers", "logits", "tokenizer"]
    assert all(check.passed for check in checks), checks


def test_check_says_that_it_skipped_loading_where_compressed_tensors_is_missing(network, tmp_path, monkeypatch):
    def nowhere(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(compressed_tensors, "version", nowhere)
    net = network("llama")
    net.write(tmp_path / "folder", net.config(seed=2))
    model = net.extracted(net.config(seed=2), tmp_path)
    last = TARGET.check(tmp_path / "folder", net.source, net.config(seed=2), model, tokens())[-1]
    assert last.passed and "skipped" in last.detail and "anyfit[compressed]" in last.detail
    monkeypatch.setattr(compressed_tensors, "version", lambda package: "0.17.1")
    assert "0.17.1 is installed" in str(LAYOUT.lacks_runtime())


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


def _lose(file: Path) -> None:
    tensors = load_file(file)
    tensors.pop("model.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})


def _repack(file: Path) -> None:
    save_file(load_file(file), file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [(_truncate, "can't be read"), (_flip, "not the extracted model's"), (_lose, "model.norm.weight"), (_repack, "were predicted")],
)
def test_check_fails_for_a_damaged_file(network, damage, said, tmp_path):
    net = network("llama")
    config = net.config(seed=3)
    net.write(tmp_path / "folder", config)
    damage(tmp_path / "folder" / "model.safetensors")
    checks = TARGET.check(tmp_path / "folder", net.source, config, net.extracted(config, tmp_path), tokens())
    assert not checks[-1].passed and said in checks[-1].detail


@needs_runtime
def test_large_folders_are_split_and_still_take_the_predicted_bytes(network, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "MAX_SHARD_BYTES", 1_000_000)
    net = network("llama")
    space = TARGET.space(net.source, net.weights, MIXABLE)
    for seed in range(3):
        config, folder = net.config(seed), tmp_path / str(seed)
        assert TARGET.write(folder, net.source, space, config, net.variant) == weight_bytes(folder) == space.bytes_(config)
        files = {file.name for file in folder.glob("*.safetensors")}
        assert len(files) > 3 and set(json.loads((folder / safetensors_file.INDEX).read_text())["weight_map"].values()) == files
    assert read_here(folder, net.source, net.extracted(config, tmp_path)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_folder_equals_the_extracted_model_to_the_bit(network, kind, tmp_path):
    net = network(kind)
    weights = net.decoded(net.config(seed=6))
    size = write_dense(tmp_path / "folder", net.source, weights)
    assert size == weight_bytes(tmp_path / "folder")
    assert "quantization_config" not in json.loads((tmp_path / "folder" / "config.json").read_text())
    assert read_here(tmp_path / "folder", net.source, net.extracted(net.config(seed=6), tmp_path)) == []


def test_a_dense_folder_can_have_the_originals_type(network, tmp_path):
    net = network("phi3")
    weights = net.decoded(net.config(seed=6))
    size = write_dense(tmp_path / "folder", net.source, weights, torch.bfloat16)
    assert size < 0.6 * write_dense(tmp_path / "float32", net.source, weights)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    expected = net.source.build(weights, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.state_dict().items())


@needs_runtime
def test_a_folder_loaded_without_settings_loses_nothing(network, tmp_path):
    net = network("llama")
    for name, dtype in (("BF16", torch.float32), ("int4_sym", torch.float32)):
        config = Config.of_formats({d.unit.name: name if any(c.name == name for c in d.choices) else "F16" for d in net.space.decisions})
        net.write(tmp_path / name, config)
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
            model(tokens())
        assert model.dtype == dtype
        expected = net.extracted(config, tmp_path)
        assert all(torch.equal(expected.parameter(key), model.get_parameter(key)) for key, _ in expected.skeleton.named_parameters())


def test_refused_formats_say_why_and_what_takes_their_place(network):
    def only(kind: str, name: str) -> dict[str, tuple[list[str], str]]:
        net = network(kind)
        space = TARGET.space(net.source, net.weights, [name])
        return {d.unit.name: ([c.name for c in d.choices], d.refused.get(name, "")) for d in space.decisions}

    llama = only("llama", "int4_sym")
    assert llama["model.embed_tokens.weight"][0] == ["int8_sym"] and "whole bytes" in llama["model.embed_tokens.weight"][1]
    assert llama["lm_head.weight"] == (["int4_sym"], "")
    choices, why = only("gpt2", "int4_asym")["transformer.h.0.attn.c_attn.weight"]
    assert choices == ["F16"] and "Conv1D" in why and "F16 takes its place" in why
    choices, why = only("gemma2", "int8_sym")["model.embed_tokens.weight"]
    assert choices == ["F16"] and "Gemma2TextScaledWordEmbedding" in why
    choices, why = only("falcon", "int8_sym")["transformer.h.0.mlp.dense_h_to_4h.weight"]
    assert choices == ["F16"] and "FalconLinear has one of its own" in why


def test_of_the_16_bit_types_the_originals_own_is_kept(tmp_path):
    folder = save_tiny(tmp_path / "model", "llama")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "dtype": "bfloat16"}))
    skeleton = Checkpoint.open(folder).skeleton()
    weights = list(architecture_of(skeleton).weights(skeleton))
    space = TARGET.space(Checkpoint.open(folder).source(weights), weights, TARGET.default_formats)
    assert all("F16" not in [c.name for c in d.choices] and "BF16" in d.refused["F16"] for d in space.decisions)


def test_an_unknown_format_is_answered_with_those_that_load(network):
    net = network("llama")
    with pytest.raises(UnknownNameError, match=r"Q4_K.*Known: .*int4_sym"):
        TARGET.space(net.source, net.weights, ["Q4_K"])


def test_a_safetensors_file_takes_the_sum_of_its_tensors(tmp_path):
    rng, numbers = random.Random(0), torch.Generator().manual_seed(0)
    for trial in range(20):
        shapes = ([rng.randint(0, 5) for _ in range(rng.randint(0, 3))] for _ in range(6))
        tensors = {
            f"tensor.{'x' * rng.randint(0, 9)}é.{i}": torch.randn(next(shapes), generator=numbers).to(dtype)
            for i, dtype in enumerate(rng.choices([torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int64, torch.bool], k=6))
        }
        slots = [Slot.of(name, tensor) for name, tensor in tensors.items()]
        path = tmp_path / f"{trial}.safetensors"
        assert write_file(path, slots, tensors.items()) == path.stat().st_size == EMPTY_BYTES + sum(slot.bytes_ for slot in slots)
        first = path.read_bytes()
        write_file(path, reversed(slots), reversed(tensors.items()))
        assert path.read_bytes() == first
        found = load_file(path)
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_shards_cover_all_parts_in_order_and_keep_to_their_size(monkeypatch):
    monkeypatch.setattr(safetensors_file, "MAX_SHARD_BYTES", 10)
    assert shards([4, 4, 4, 12, 1, 9, 1]) == [range(2), range(2, 3), range(3, 4), range(4, 6), range(6, 7)]
    assert shards([]) == [range(0)]
