"""Networks ready to be timed in llama.cpp: written as any model is, with numbers that nobody computed, and run in this process.

What is timed is what people run: matrices repacked for the processor, a cache of halves, and logits of the last token only.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from anyfit import network
from anyfit.calibration.statistics import InputStatistics
from anyfit.checkpoint import Source
from anyfit.core.config import Config
from anyfit.core.errors import RuntimeMissingError
from anyfit.costs.latency import DECODE, Setting
from anyfit.costs.stopwatch import Run, Stopwatch
from anyfit.formats import formats
from anyfit.quantizers.rtn import QUANTIZER
from anyfit.targets import gguf_cut, gguf_layout, llamacpp_runtime

_ROWS = 64
"""Rows of numbers that are made; those of a matrix are these again and again."""
_CHUNK = 512
"""Tokens that llama.cpp computes at once, unless told otherwise."""


class LlamaCppStopwatch(Stopwatch):
    def __init__(self, names: tuple[str, ...]) -> None:
        self.formats = names
        self._encoded: dict[str, Tensor] = {}
        try:
            self.runtime = f"llama.cpp of {llamacpp_runtime.PACKAGE} {version(llamacpp_runtime.PACKAGE)}"
        except PackageNotFoundError as error:
            raise RuntimeMissingError(llamacpp_runtime.PACKAGE, llamacpp_runtime.EXTRA, "Measuring latency") from error

    def refuses(self, config: PretrainedConfig) -> str | None:
        reason = gguf_cut.refuses(config)
        return reason and f"Modules of this network can't be timed in llama.cpp: {reason}."

    def last(self, setting: Setting) -> float:
        """After the last attention, only tokens are computed that logits are asked of: one of each text."""
        return 1.0 if setting.phase == DECODE else 1 / setting.sequence

    def ready(self, model: PreTrainedModel, format_: str, setting: Setting, threads: int, folder: Path) -> Run:
        path = folder / "model.gguf"
        with network.quiet():
            self._write(path, model, format_)
        loaded = _Loaded(path, setting, threads)
        return loaded.decode if setting.phase == DECODE else loaded.prefill

    def _write(self, path: Path, model: PreTrainedModel, format_: str) -> None:
        whole = network.frame(_uncut(model), trust_remote_code=False)
        made = gguf_cut.spelled(model, whole)
        norms = {name: torch.ones(tensor.shape) for name, tensor in made.source(Source(path.parent, whole.config, {})).passthrough.items()}
        source = Source(path.parent, made.model.config, norms)
        shapes = {name: weight.shape for name, weight in made.weights.items()}
        names = {name: gguf_cut.zeros(shape) if name in made.made else gguf_layout.legal(format_, shape) for name, shape in shapes.items()}
        matrices, fixed = gguf_layout.matrices(source, shapes, Config.of_formats(names)), gguf_layout.fixed_tensors(source)
        writer = gguf_layout.write_header(path, source, matrices, fixed, tokenizer=False)
        try:
            for matrix in matrices:
                writer.write_tensor_data(self._numbers(matrix.format, matrix.shape).numpy())
            for value in fixed.values():
                writer.write_tensor_data(value.numpy())
        finally:
            writer.close()

    def _numbers(self, format_: str, shape: tuple[int, int]) -> Tensor:
        """Bytes of a matrix, uint8 (rows, row_bytes), of numbers of the size that a network's are. Shorter rows begin as longer ones do."""
        grid, (rows, columns) = formats.get(format_), shape
        width = grid.row_bytes(columns)
        if format_ not in self._encoded or self._encoded[format_].shape[1] < width:
            values = 0.02 * torch.randn(_ROWS, columns, generator=torch.Generator().manual_seed(0))
            self._encoded[format_] = QUANTIZER.encode(values, QUANTIZER.prepare(InputStatistics.unknown(columns)), grid).data
        return self._encoded[format_][:, :width].repeat(-(-rows // _ROWS), 1)[:rows].contiguous()


def _uncut(model: PreTrainedModel) -> Any:
    """The config of a network of which nothing is cut."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.per_layer_config = None
    return config


class _Loaded:
    """A file in llama.cpp, and a context for one setting, whose cache holds the tokens before the one that is decoded."""

    def __init__(self, path: Path, setting: Setting, threads: int) -> None:
        self._api = api = _llama_cpp()
        self._setting = setting
        settings = api.llama_model_default_params()
        settings.use_extra_bufts = not _has_amx()
        self._model = api.llama_model_load_from_file(str(path).encode(), settings)
        assert self._model, path
        self._context = api.llama_init_from_model(self._model, self._context_settings(threads))
        assert self._context, path
        self._memory = api.llama_get_memory(self._context)
        size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._tokens = (torch.arange(setting.batch * setting.sequence) % size).reshape(setting.batch, -1).tolist()
        self._batch = api.llama_batch_init(setting.batch * setting.sequence, 0, 1)
        # Not where the process ends: by then the library may be gone.
        weakref.finalize(self, _free, api, self._batch, self._context, self._model).atexit = False
        self.prefill()
        self._fill([[row[-1]] for row in self._tokens], setting.sequence)

    def _context_settings(self, threads: int) -> Any:
        setting, settings = self._setting, self._api.llama_context_default_params()
        settings.n_seq_max = setting.batch
        settings.n_ctx = setting.batch * (setting.sequence + 1)
        settings.n_batch = setting.batch * setting.sequence
        settings.n_ubatch = min(settings.n_batch, _CHUNK)
        settings.n_threads = settings.n_threads_batch = threads
        return settings

    def prefill(self) -> None:
        """All tokens at once, and the logits after the last of each text."""
        self._api.llama_memory_clear(self._memory, False)
        self._fill(self._tokens, 0)
        self._run()

    def decode(self) -> None:
        """The token after them, which is forgotten again."""
        self._run()
        for text in range(self._setting.batch):
            self._api.llama_memory_seq_rm(self._memory, text, self._setting.sequence, -1)

    def _fill(self, tokens: list[list[int]], first: int) -> None:
        """Make the batch one of these tokens of each text, the first of which stands at `first`."""
        batch, place = self._batch, 0
        for text, row in enumerate(tokens):
            for index, token in enumerate(row):
                batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, first + index, 1
                batch.seq_id[place][0], batch.logits[place] = text, index == len(row) - 1
                place += 1
        batch.n_tokens = place

    def _run(self) -> None:
        code = self._api.llama_decode(self._context, self._batch)
        assert code == 0, code
        self._api.llama_synchronize(self._context)


def _free(api: Any, batch: Any, context: Any, model: Any) -> None:
    api.llama_batch_free(batch)
    api.llama_free(context)
    api.llama_model_free(model)


@lru_cache(maxsize=1)
def _llama_cpp() -> Any:
    """The package, ready and silent."""
    import llama_cpp

    # kept by the module, which llama.cpp calls for as long as the process lasts
    llama_cpp.anyfit_silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(llama_cpp.anyfit_silence, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def _has_amx() -> bool:
    """Whether llama.cpp would repack matrices for the processor's tiles, in kernels that kill the process on some machines."""
    try:
        return "amx_int8" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
