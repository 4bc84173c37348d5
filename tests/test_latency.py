"""Tables of latencies: measured in turns, refused on another device; the networks that are timed for their modules."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, repeat

import pytest
import torch
from typer.testing import CliRunner

from anyfit import cli, measuring
from anyfit.architectures import architecture_of
from anyfit.architectures.llama import LLAMA
from anyfit.core.config import HEADS, WIDTH
from anyfit.core.errors import UserError
from anyfit.costs import stopwatch
from anyfit.costs.latency import ATTENTION, DECODE, FEED_FORWARD, PHASES, PREFILL, Device, LatencyTable, Setting, Shape
from anyfit.costs.parts import measured as measured_parts
from anyfit.costs.probes import shape_of, sized
from anyfit.costs.stopwatch import Stopwatch, sizes
from anyfit.interface import interface_of
from anyfit.structure import levels
from anyfit.structure.cutting import Kept, cut
from anyfit.structure.space import structures
from anyfit.targets import targets
from anyfit.targets.torch_stopwatch import TorchStopwatch, _fill
from anyfit.testing.models import save_tiny, tiny_model

SHAPE = Shape(kind="llama", hidden=256, head_dim=64, queries=2, groups=2, width=512, blocks=2, out=512)
SETTING = Setting(batch=1, sequence=16)


def table(**changes) -> LatencyTable:
    modules = {(ATTENTION, 2, "F32"): 2.0, (ATTENTION, 1, "F32"): 1.25, (FEED_FORWARD, 512, "F32"): 3.0, (FEED_FORWARD, 256, "F32"): 1.5}
    made = LatencyTable("onnxruntime", Device.here("onnxruntime 1", 1), SETTING, SHAPE, {"F32": 11.0}, modules, {"F32": 1.5})
    return replace(made, **changes)


def test_a_prediction_is_the_rest_and_the_sum_of_the_modules():
    found = table()
    assert found.rest("F32") == 1.0
    assert found.predict("F32", [(2, 256), (0, 0)]) == 4.5
    assert found.predict("F32", [(0, 0), (2, 256)]) == 4.5
    with pytest.raises(UserError, match=r"size 384 in F32 was not measured.*256, 512"):
        found.ms(FEED_FORWARD, 384, "F32")


def test_smaller_modules_count_for_more_where_a_budget_is_kept():
    found = table(modules={**table().modules, (ATTENTION, 1, "F32"): 1.8, (FEED_FORWARD, 256, "F32"): 3.2})
    assert found.at_most(ATTENTION, 1, "F32") == 2.0, "as much as a whole one"
    assert found.at_most(FEED_FORWARD, 256, "F32") == 3.2, "what it is expected to take, if that is more"
    assert found.at_most(ATTENTION, 2, "F32") == 2.0 and found.at_most(ATTENTION, 0, "F32") == 0
    assert table().at_most(FEED_FORWARD, 256, "F32") == 1.5 * 1.5


def test_the_last_feed_forward_takes_its_share():
    found = table(last=0.25)
    assert found.rest("F32") == 11.0 - 4.0 - 3.0 - 0.75
    assert found.predict("F32", SHAPE.uncut) == 11.0
    assert found.predict("F32", [(2, 512), (2, 256)]) == 11.0 - 0.25 * 1.5
    assert found.predict("F32", [(2, 256), (0, 0)]) == found.predict("F32", [(0, 0), (2, 256)]) == 11.0 - 2.0 - 3.0 - 0.25 * 1.5
    assert found.predict("F32", [(2, 256), (2, 512)]) == 11.0 - 1.5
    of = measured_parts(found, ["F32"]).of
    model = tiny_model("llama")
    architecture = architecture_of(model)
    by_block = {(s.axis, s.reader.block): s for s in structures(model, architecture, architecture.weights(model)).values()}
    assert [of(by_block[WIDTH, block], 256, "F32") for block in (0, 1)] == [1.5 * 1.5, 0.375 * 1.5]
    assert [of(by_block[HEADS, block], 1, "F32") for block in (0, 1)] == [1.25 * 1.5] * 2


def test_a_table_is_read_back_and_refused_on_another_device(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "_stopwatch", lambda target: FakeStopwatch("onnxruntime 1"))
    table().write(tmp_path / "table.json")
    assert measuring.latencies(tmp_path / "table.json") == table()
    for field, value in {"processor": "Z80", "cores": 1000, "runtime": "onnxruntime 2", "threads": 7}.items():
        other = table(device=replace(table().device, **{field: value}))
        other.write(tmp_path / "other.json")
        if field == "threads":
            assert measuring.latencies(tmp_path / "other.json").device.threads == 7
            continue
        with pytest.raises(UserError, match=f"another device's: {field} {value}"):
            measuring.latencies(tmp_path / "other.json")


@pytest.mark.parametrize("text", ["{", "{}", '{"version": 99}', "[]", '{"version": 1, "device": {}}'])
def test_what_is_no_table_is_refused(text, tmp_path):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(UserError, match=r"table\.json"):
        LatencyTable.read(tmp_path / "table.json")
    with pytest.raises(UserError, match="no file"):
        LatencyTable.read(tmp_path / "nothing.json")


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0, "fast", None])
@pytest.mark.parametrize(("part", "field"), [("whole", "F32"), ("modules", "ms"), ("margins", "F32"), ("", "last")])
def test_what_is_no_latency_is_refused(part, field, wrong, tmp_path):
    data = table().to_json()
    {**data, "modules": data["modules"][1], "": data}[part][field] = wrong
    with pytest.raises(UserError, match=r"table\.json is no table of latencies"):
        LatencyTable.read(written(data, tmp_path))


@pytest.mark.parametrize(("part", "field"), [("whole", "F16"), ("device", "threads"), ("shape", "width"), ("setting", "sequence")])
def test_parts_of_a_table_are_what_they_should_be(part, field, tmp_path):
    data = table().to_json()
    assert LatencyTable.read(written(data, tmp_path)) == table()
    data[part][field] = 2.5
    with pytest.raises(UserError, match=r"table\.json is no table of latencies"):
        LatencyTable.read(written(data, tmp_path))


def written(data, folder):
    (folder / "table.json").write_text(json.dumps(data))
    return folder / "table.json"


class FakeStopwatch(Stopwatch):
    """Its networks take time on a clock of its own, by a formula, `changed` by what is in its blocks; the machine is three times as
    slow now and then."""

    formats = ("F32", "F16")

    def __init__(self, runtime: str = "fake 1") -> None:
        self.runtime, self.now, self.runs = runtime, 0.0, count()
        self.changed = lambda took, blocks: took

    def ready(self, model, format_, setting, threads, folder):
        assert not list(folder.iterdir())
        blocks = model.model.layers
        took = 7.0
        for block in blocks:
            took += block.self_attn.q_proj.out_features / 64 if hasattr(block.self_attn, "q_proj") else 0
            took += block.mlp.up_proj.out_features / 128 if hasattr(block.mlp, "up_proj") else 0
        took = self.changed(took, [(hasattr(b.self_attn, "q_proj"), getattr(b.mlp, "up_proj", None)) for b in blocks])
        took *= 0.5 if format_ == "F16" else 1.0

        def run():
            self.now += 1e-3 * took * (3 if next(self.runs) // 40 % 2 else 1)

        return run


def test_modules_are_timed_beside_the_whole_network(monkeypatch):
    fake = FakeStopwatch()
    monkeypatch.setattr(stopwatch.time, "thread_time", lambda: fake.now)
    monkeypatch.setattr(stopwatch, "SECONDS", 0.0)
    config = tiny_model("llama").config
    found = stopwatch.measure(fake, config, "fake", SETTING, formats=("F32", "F16"), threads=1)
    assert found.shape == SHAPE and found.device == Device.here("fake 1", 1)
    assert found.sizes(ATTENTION, "F32") == [1, 2] and found.ms(ATTENTION, 0, "F32") == 0 and found.sizes(FEED_FORWARD, "F16")[-1] == 512
    for name, factor in (("F32", 1.0), ("F16", 0.5)):
        slow = found.whole[name] / (23.0 * factor)
        assert slow in (pytest.approx(1), pytest.approx(3))
        for groups in (1, 2):
            assert found.ms(ATTENTION, groups, name) == pytest.approx(2 * groups * factor * slow)
        for width in found.sizes(FEED_FORWARD, name):
            assert found.ms(FEED_FORWARD, width, name) == pytest.approx(width / 128 * factor * slow, abs=1e-6)
        assert found.rest(name) == pytest.approx(7.0 * factor * slow)


def measured_by(fake, monkeypatch, progress=None, **changes):
    fake.runs = repeat(0)
    monkeypatch.setattr(stopwatch.time, "thread_time", lambda: fake.now)
    monkeypatch.setattr(stopwatch, "SECONDS", 0.0)
    return stopwatch.measure(fake, tiny_model("llama", **changes).config, "fake", SETTING, threads=1, progress=progress)


@pytest.mark.parametrize("together", [-0.8, 0.8])
def test_smaller_networks_take_no_longer_than_they_count_for(together, monkeypatch):
    """Where a block of both kinds takes other than what they take by themselves."""
    fake = FakeStopwatch()
    fake.changed = lambda took, blocks: took + together * sum(attention and up is not None for attention, up in blocks)
    found = measured_by(fake, monkeypatch)
    assert found.whole["F32"] == pytest.approx(23 + 2 * together)
    assert found.predict("F32", [(2, 512)] * 2) == pytest.approx(found.whole["F32"])
    assert found.predict("F32", [(1, 256)] * 2) == pytest.approx(7 + 2 * (2 + 2 + together), rel=0.05)
    assert found.bound("F32", [(1, 256)] * 2) >= 0.99 * (7 + 2 * (2 + 2 + together))


def test_networks_of_mixed_sizes_take_no_longer_than_they_count_for(monkeypatch):
    """Where they take a tenth longer than their modules do in networks of one size."""
    fake = FakeStopwatch()
    fake.changed = lambda took, blocks: took * (1.1 if len({up.out_features for _, up in blocks if up}) > 1 else 1.0)
    found, exact = measured_by(fake, monkeypatch), measured_by(FakeStopwatch(), monkeypatch)
    mixed = [(1, 384), (2, 128)]
    assert found.bound("F32", mixed) >= 0.98 * 1.1 * exact.predict("F32", mixed)
    assert found.predict("F32", [(2, 512)] * 2) == pytest.approx(exact.whole["F32"])
    for kind, size, _ in found.modules:
        assert exact.ms(kind, size, "F32") - 1e-9 <= found.at_most(kind, size, "F32") <= found.ms(kind, SHAPE.full(kind), "F32"), (
            kind,
            size,
        )


def test_networks_that_lack_parts_are_predicted_within_a_few_percent(monkeypatch):
    """Where blocks that lack one kind alone take something for it, which belongs to no module."""
    fake = FakeStopwatch()
    fake.changed = lambda took, blocks: took + 0.2 * sum(attention != (up is not None) for attention, up in blocks)
    found = measured_by(fake, monkeypatch)
    truth = 7 + 2 + 4 + 2 * 0.2
    assert 0.98 * truth <= found.predict("F32", [(1, 0), (0, 512)]) <= 1.05 * truth


def test_what_modules_share_is_not_saved_by_leaving_out_some_of_them(monkeypatch):
    """Where something runs once for all attentions, as masks do."""
    fake = FakeStopwatch()
    fake.changed = lambda took, blocks: took + 1.2 * any(attention for attention, _ in blocks)
    found = measured_by(fake, monkeypatch, num_hidden_layers=6)
    assert found.predict("F32", found.shape.uncut) == pytest.approx(found.whole["F32"]) == pytest.approx(7 + 6 * 8 + 1.2)
    for groups, width in ((2, 512), (1, 256)):
        blocks = [(0, width), (groups, 0)] * 3
        truth = 7 + 3 * (2 * groups + width / 128) + 1.2
        assert 0.98 * truth <= found.predict("F32", blocks) <= 1.05 * truth


def test_a_network_that_was_slow_once_is_outvoted(monkeypatch):
    """One in the place of which a tenth more was found; as a difference to one without, its modules would take nearly half more."""
    fake = FakeStopwatch()
    fake.changed = lambda took, blocks: took * (1.1 if {getattr(up, "out_features", 0) for _, up in blocks} == {256} else 1.0)
    found, exact = measured_by(fake, monkeypatch), measured_by(FakeStopwatch(), monkeypatch)
    assert fake.changed(1.0, [(True, torch.nn.Linear(1, 256))]) == 1.1
    assert found.ms(FEED_FORWARD, 256, "F32") == pytest.approx(exact.ms(FEED_FORWARD, 256, "F32"), rel=0.15)


@pytest.mark.parametrize("unlucky", [{256}, {512}, None])
def test_a_copy_that_is_slow_for_as_long_as_it_lives_does_not_count(unlucky, monkeypatch):
    """The first of each network of these widths, the whole one too, or of every network. Budgets count on it where many pairs differ so."""

    class Unlucky(FakeStopwatch):
        def ready(self, model, format_, setting, threads, folder):
            wide = {getattr(block.mlp, "up_proj", torch.nn.Linear(1, 1)).out_features for block in model.model.layers}
            sizes_ = tuple(parameter.shape for parameter in model.parameters())
            slow = unlucky in (wide, None) and sizes_ not in seen
            seen.add(sizes_)
            run = super().ready(model, format_, setting, threads, folder)
            return (lambda: [run(), setattr(self, "now", self.now + 2e-3)]) if slow else run

    seen: set = set()
    found, exact = measured_by(Unlucky(), monkeypatch), measured_by(FakeStopwatch(), monkeypatch)
    assert seen and found.whole == pytest.approx(exact.whole) and found.modules == pytest.approx(exact.modules)
    assert exact.margins["F32"] == pytest.approx(1.0)
    if unlucky is None:
        assert found.margins["F32"] > 1 + 2 / 23
    else:  # one network of all
        assert found.margins["F32"] == pytest.approx(1.0)


def test_sizes_that_a_runtime_is_slow_at_are_known_as_such(monkeypatch):
    """Where every other width takes as long as the next larger one and more."""
    fake = FakeStopwatch()

    def odd(width):
        return 1.0 if width // 32 % 2 else 0.0

    fake.changed = lambda took, blocks: took + sum(odd(up.out_features) for _, up in blocks if up)
    found = measured_by(fake, monkeypatch)
    for width in found.sizes(FEED_FORWARD, "F32"):
        assert found.ms(FEED_FORWARD, width, "F32") == pytest.approx(width / 128 + odd(width), rel=0.1)
    assert found.ms(FEED_FORWARD, 96, "F32") > found.ms(FEED_FORWARD, 128, "F32")


@pytest.mark.parametrize("last", [0.0, 0.25])
def test_what_the_last_feed_forward_takes_is_known_from_the_runtime(last, monkeypatch):
    fake = FakeStopwatch()

    def saved(blocks):
        return (1 - last) * next((up.out_features / 128 if up else 0 for attention, up in reversed(blocks) if attention or up), 0)

    fake.changed = lambda took, blocks: took - saved(blocks)
    fake.last = lambda setting: last
    found = measured_by(fake, monkeypatch)
    assert found.last == last and found.whole["F32"] == pytest.approx(19 + 4 * last)
    for blocks in ([(1, 128), (2, 512)], [(2, 512), (1, 128)], [(2, 0), (0, 512)]):
        truth = 7 + sum(2 * groups + width / 128 for groups, width in blocks) - (1 - last) * blocks[-1][1] / 128
        assert found.predict("F32", blocks) == pytest.approx(truth, rel=1e-3)


def test_networks_take_turns(monkeypatch):
    """On a machine that slows down all but the whole network for longer than one of them is timed."""
    now, told = 0.0, []

    def run_of(took, hurt):
        def run():
            nonlocal now
            now += took * (2 if hurt and now % 240 > 120 else 1)

        return run

    monkeypatch.setattr(stopwatch.time, "thread_time", lambda: now)
    found = stopwatch.Clock(run_of(2.0, False), 1).shares([run_of(1.0, True) for _ in range(5)], lambda: told.append(now))
    assert len(set(found)) == 1 and found[0] in (0.5, 1.0)
    assert len(told) == 5 and now > 120


def test_caches_are_warm_when_a_run_counts(monkeypatch):
    """What has had turns of many others in between is slow at first, and no slower than the whole network when it is timed."""
    now, since = 0.0, {}

    def run_of(name):
        def run():
            nonlocal now
            warm = since.get(name, 0)
            for other in since:
                since[other] -= 0.25 * (other != name)
            since[name] = min(4, max(0, warm) + 1)
            now += 1e-3 * (1.5 - min(0.5, 0.125 * max(0, warm)))

        return run

    monkeypatch.setattr(stopwatch.time, "thread_time", lambda: now)
    found = stopwatch.Clock(run_of("whole"), 1).shares([run_of(name) for name in "abcdef"])
    assert found == pytest.approx([1.0] * 6)


@pytest.mark.parametrize(("seconds", "runs"), [(1e-3, 5), (4e-3, 4), (8e-3, 3), (0.02, 2), (5.0, 2)])
def test_what_takes_long_is_not_run_often_for_that(monkeypatch, seconds, runs):
    now, ran = 0.0, []

    def run():
        nonlocal now
        now += seconds
        ran.append(now)

    monkeypatch.setattr(stopwatch.time, "thread_time", lambda: now)
    assert stopwatch.Clock(run, 1)._took(run) == pytest.approx(1e3 * seconds)
    assert len(ran) == runs


def test_a_network_is_timed_for_some_seconds_and_in_some_rounds():
    assert stopwatch._rounds(1e-3) == 1000
    assert stopwatch._rounds(0.1) == 21, "rounds at least"
    assert stopwatch._rounds(0.5) == 8, "seconds at most"
    assert stopwatch._rounds(100.0) == 5, "rounds at least, however long they take"


class Counted:
    """A progress that counts what it is told."""

    def __init__(self):
        self.total = self.done = 0

    @contextmanager
    def stage(self, name, total):
        self.total += total
        yield self

    def advance(self, n=1, detail=""):
        self.done += n

    def note(self, text):
        raise AssertionError(text)


@pytest.mark.parametrize(
    ("bound", "at_once"), [("none", None), ("numbers", 1), ("memory", 3), ("disk", 3), ("threads", 5), ("unknown", None)]
)
def test_no_more_networks_are_held_than_fit(bound, at_once, monkeypatch):
    """And no others are found than with all at once. Of memory and disk, each network takes a tenth."""
    held, most, progress = weakref.WeakSet(), 0, Counted()

    class Counting(FakeStopwatch):
        def ready(self, *args):
            nonlocal most
            run = super().ready(*args)
            held.add(run)
            most = max(most, len(held))
            return run

    def of_ten(bytes_=1000):
        return bytes_ - 100 * (len(held) - 1)

    monkeypatch.setattr(stopwatch.memory, "free", lambda: None if bound == "unknown" else of_ten() if bound == "memory" else 1000)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(stopwatch.shutil, "disk_usage", lambda _: usage._replace(free=of_ten() if bound == "disk" else 1000))
    if bound == "numbers":
        monkeypatch.setattr(stopwatch, "HELD", 1)
    if bound == "threads":
        monkeypatch.setattr(stopwatch, "ALIVE", 5)
    found, together = measured_by(Counting(), monkeypatch, progress=progress), measured_by(FakeStopwatch(), monkeypatch)
    assert found.modules == pytest.approx(together.modules) and found.whole == pytest.approx(together.whole)
    number = stopwatch.COPIES * len(stopwatch._networks(SHAPE))
    assert most == 1 + (at_once or number), "beside the whole network"
    assert progress.done == progress.total == number


def test_formats_are_timed_beside_each_other(monkeypatch):
    """On a machine that becomes slow once the first is done."""

    class Tiring(FakeStopwatch):
        def ready(self, model, format_, setting, threads, folder):
            if format_ == "F16":
                self.runs = repeat(40)
            return super().ready(model, format_, setting, threads, folder)

    fake = Tiring()
    fake.runs = repeat(0)
    monkeypatch.setattr(stopwatch.time, "thread_time", lambda: fake.now)
    monkeypatch.setattr(stopwatch, "SECONDS", 0.0)
    found = stopwatch.measure(fake, tiny_model("llama").config, "fake", SETTING, formats=("F32", "F16"), threads=1)
    assert found.whole == {"F32": pytest.approx(23.0), "F16": pytest.approx(11.5)}
    assert found.ms(ATTENTION, 2, "F16") == pytest.approx(2.0)


def test_a_format_that_is_said_twice_is_timed_once(monkeypatch):
    fake, progress = FakeStopwatch(), Counted()
    monkeypatch.setattr(stopwatch.time, "thread_time", lambda: fake.now)
    monkeypatch.setattr(stopwatch, "SECONDS", 0.0)
    config = tiny_model("llama").config
    found = stopwatch.measure(fake, config, "fake", SETTING, formats=("F32", "F16", "F32"), threads=1, progress=progress)
    assert list(found.whole) == ["F32", "F16"]
    assert progress.done == progress.total == 2 * stopwatch.COPIES * len(stopwatch._networks(SHAPE))


def test_what_runs_in_the_place_of_a_module_is_counted(monkeypatch):
    """Where a feed-forward can't be left out: its smallest, which stands in its place, belongs to the rest."""

    class NeverWithout(FakeStopwatch):
        def ready(self, model, format_, setting, threads, folder):
            for block in model.model.layers:
                if not hasattr(block.mlp, "up_proj"):
                    block.mlp.up_proj = torch.nn.Linear(1, 32, device="meta")
            return super().ready(model, format_, setting, threads, folder)

    fake = NeverWithout()
    fake.runs = iter(lambda: 0, 1)
    monkeypatch.setattr(stopwatch.time, "thread_time", lambda: fake.now)
    monkeypatch.setattr(stopwatch, "SECONDS", 0.0)
    found = stopwatch.measure(fake, tiny_model("llama").config, "fake", SETTING, threads=1)
    assert found.whole["F32"] == pytest.approx(23.0)
    assert found.ms(FEED_FORWARD, 32, "F32") == pytest.approx(0) and found.rest("F32") == pytest.approx(7.5)
    assert found.ms(ATTENTION, 2, "F32") == pytest.approx(4.0) and found.ms(ATTENTION, 0, "F32") == pytest.approx(0)
    assert found.predict("F32", [(2, 512)] * 2) == pytest.approx(23.0)
    assert LatencyTable.from_json(found.to_json()) == found


def test_what_cannot_be_timed_is_refused_before_anything_is_built(monkeypatch):
    config, fake = tiny_model("llama").config, FakeStopwatch()
    for wrong, said in (
        ({"formats": ("Q4_K",)}, "Q4_K"),
        ({"threads": 4096}, "threads"),
        ({"setting": Setting(1, 100_000)}, "context"),
    ):
        given = {"setting": SETTING, **wrong}
        with pytest.raises(UserError, match=said):
            stopwatch.measure(fake, config, "fake", **given)
    with pytest.raises(UserError, match="phase"):
        Setting(1, 1, "sleep")
    with pytest.raises(UserError, match="decode"):
        stopwatch.measure(fake, tiny_model("bert").config, "fake", replace(SETTING, phase=DECODE))
    with pytest.raises(UserError, match="bloom"):
        shape_of(tiny_model("bloom").config)
    monkeypatch.setattr(type(targets.get("transformers")), "stopwatch", lambda _: None)
    with pytest.raises(UserError, match="no stopwatch"):
        measuring.measure(target="transformers")


def test_widths_form_a_ladder_of_multiples_down_from_the_uncut_one():
    assert sizes(SHAPE, ATTENTION) == [2, 1]
    ladder = sizes(replace(SHAPE, width=1000), FEED_FORWARD)
    assert ladder[0] == 1000 and ladder[-1] == 32 and all(width % 32 == 0 for width in ladder[1:])
    assert ladder == sorted(set(ladder), reverse=True)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "vit"])
def test_kinds_whose_config_cannot_be_told_sizes_are_cut_to_them(kind):
    config = tiny_model(kind).config
    shape = shape_of(config)
    assert (shape.hidden, shape.head_dim, shape.queries, shape.groups, shape.width, shape.blocks) == (256, 64, 1, 4, 512, 2)
    model = sized(config, [(3, 96)] * shape.blocks)
    architecture = architecture_of(model)
    shapes = {weight.role: weight.shape for weight in architecture.weights(model) if weight.block == 1}
    assert shapes["o"] == (256, 192) and shapes["down"] == (256, 96) and shapes["up"] == (96, 256)
    for block in ((0, 512), (4, 0), (0, 0)):
        without = sized(config, [block] * shape.blocks)
        _fill(without)
        with torch.no_grad():
            interface = interface_of(config)
            assert interface(without, interface.example(without.config, 2, 12)).isfinite().all()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_network_without_a_kind_of_modules_is_one_whose_modules_give_nothing(kind):
    config = tiny_model(kind).config
    blocks = shape_of(config).blocks
    tokens = torch.arange(2 * 12).reshape(2, 12)
    for groups, width in ((1, 0), (0, 96), (0, 0)):
        model = sized(config, [(groups, width)] * blocks)
        _fill(model)
        whole = sized(config, [(1, 96)] * blocks)
        _fill(whole)
        whole.load_state_dict(model.state_dict(), strict=False)
        for layer in whole.model.layers:
            if not groups:
                layer.self_attn.o_proj.weight.zero_()
            if not width:
                layer.mlp.down_proj.weight.zero_()
        with torch.no_grad():
            assert torch.allclose(model(tokens).logits, whole(tokens).logits, atol=1e-5)


def test_torch_decodes_the_token_that_comes_after_the_cached_ones(tmp_path):
    config = tiny_model("llama").config
    run = TorchStopwatch().ready(sized(config, [(2, 512)] * 2), "F32", Setting(2, 24, DECODE), 1, tmp_path)
    cache = run.__closure__ and next(cell.cell_contents for cell in run.__closure__ if hasattr(cell.cell_contents, "get_seq_length"))
    for _ in range(3):
        run()
        assert cache.get_seq_length() == 24


@pytest.mark.parametrize("phase", PHASES)
def test_onnxruntime_runs_what_a_setting_says(phase, tmp_path):
    pytest.importorskip("onnxruntime")
    config = tiny_model("llama", num_hidden_layers=2).config
    model = cut(sized(config, [(2, 512)] * 2), LLAMA, [Kept(torch.arange(1), torch.arange(64)), Kept(torch.arange(0), None)])
    run = targets.get("onnxruntime").stopwatch().ready(model, "int4_sym", Setting(2, 24, phase), 1, tmp_path)
    for _ in range(2):
        logits, keys, values = (item.numpy() for item in run())
        assert logits.shape == (2, 24 if phase == PREFILL else 1, config.vocab_size)
        assert keys.shape == values.shape == (2, 1, 24 if phase == PREFILL else 25, 64)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("batch", [1, 2])
def test_llamacpp_runs_what_a_setting_says(phase, batch, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    config = tiny_model("llama").config
    watch = targets.get("llama.cpp").stopwatch()
    for name, block in (("F16", (2, 512)), ("Q8_0", (2, 0)), ("Q4_K", (0, 512)), ("Q4_0", (0, 0))):
        (tmp_path / name).mkdir()
        run = watch.ready(sized(config, [block] * 2), name, Setting(batch, 24, phase), 1, tmp_path / name)
        loaded = run.__self__
        for _ in range(2):
            run()
            last = [llama_cpp.llama_memory_seq_pos_max(loaded._memory, text) for text in range(batch)]
            assert last == [23] * batch and loaded._batch.n_tokens == (batch if phase == DECODE else 24 * batch)
        asked = sum(loaded._batch.logits[place] for place in range(loaded._batch.n_tokens))
        assert asked == pytest.approx(watch.last(Setting(batch, 24, phase)) * loaded._batch.n_tokens)


def test_llamacpp_times_networks_like_llama_only():
    pytest.importorskip("llama_cpp")
    with pytest.raises(UserError, match="only for networks like Llama"):
        stopwatch.measure(targets.get("llama.cpp").stopwatch(), tiny_model("qwen2").config, "llama.cpp", SETTING, threads=1)


def test_a_table_says_what_its_milliseconds_are():
    assert "4 x 16 tokens at once" in str(table(setting=Setting(4, 16)))
    assert "those of one token after 128, as measured in onnxruntime 1 with 1 thread on" in str(table(setting=Setting(1, 128, DECODE)))
    assert str(Setting(4, 128, DECODE)) == "one token of each of 4 texts after 128"


@pytest.mark.slow
def test_a_smaller_networks_latency_is_predicted(tmp_path):
    """In plain torch, which builds networks fast; the bar is loose because other tests run beside this one."""
    config = tiny_model("llama").config
    found = measuring_of(config)
    small = [(1, sizes(found.shape, FEED_FORWARD)[6])] * found.shape.blocks
    predicted = found.predict("F32", small)
    watch = TorchStopwatch()
    whole = watch.ready(sized(config, [(2, 512)] * 2), "F32", found.setting, 1, tmp_path)
    [share] = stopwatch.Clock(whole, 1).shares([watch.ready(sized(config, small), "F32", found.setting, 1, tmp_path)])
    assert predicted == pytest.approx(share * found.whole["F32"], rel=0.25)


def test_the_command_writes_the_table_and_prints_it(tmp_path, monkeypatch):
    monkeypatch.setattr(stopwatch, "SECONDS", 0.0)
    monkeypatch.setattr(stopwatch, "ROUNDS", 1)
    monkeypatch.setattr(levels, "STEP", 256)
    path = tmp_path / "table.json"
    model = save_tiny(tmp_path / "model")
    tiny_model("llama").to(torch.bfloat16).save_pretrained(model)
    arguments = ["measure", str(model), "--target", "transformers", "--sequence", "16", "--threads", "1"]
    result = CliRunner().invoke(cli.app, [*arguments, "-o", str(path), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == measuring.latencies(path).to_json() == json.loads(path.read_text())
    assert list(measuring.latencies(path).whole) == ["BF16"], "the type in which a pruned network is stored"
    again = CliRunner().invoke(cli.app, [*arguments, "-o", str(path)])
    assert again.exit_code == 2 and "exists" in again.stderr
    shown = CliRunner().invoke(cli.app, [*arguments, "-o", str(path), "--force"])
    assert "besides its modules" in shown.stdout and "feed_forward" in shown.stdout


def measuring_of(config) -> LatencyTable:
    return stopwatch.measure(TorchStopwatch(), config, "transformers", Setting(1, 128), threads=1)


def test_the_table_on_disk_is_readable(tmp_path):
    table().write(tmp_path / "table.json")
    data = json.loads((tmp_path / "table.json").read_text())
    assert data["modules"][0] == {"kind": "attention", "size": 1, "format": "F32", "ms": 1.25}
    assert data["setting"] == {"batch": 1, "sequence": 16, "phase": "prefill"}
