"""Shared by all tests: offline, one thread, and a tiny model on disk."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from anyfit import finalists
from anyfit.structure import levels
from anyfit.testing.models import save_tiny, tiny_text

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds; runs with --slow only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs --slow"))


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, as a Hugging Face folder. Not to be written to."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pages of made-up sentences."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(tiny_text(400, seed=seed) for seed in range(30)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def few_sizes() -> Iterator[None]:
    """Feed-forwards of half the width at each step, and few finalists: a family that is fitted measures every size by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(levels, "SHRINKING", 0.5)
        patch.setattr(finalists, "NUM_FINALISTS", 3)
        yield


@pytest.fixture
def same_random_state() -> Iterator[None]:
    """Fails the test that leaves torch's global random state other than it found it."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "the global random state was touched"
