"""llama.cpp in this process, by the C functions that `llama-cpp-python` brings: a model, and the texts it is reading.

Legend: B rows whose logits are wanted, V vocabulary.
"""

import ctypes
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from farflung.protocol.errors import ConfigError, EngineAway

log = logging.getLogger(__name__)
MOST_TEXTS: Final = 256
"""llama.cpp remembers no more at once."""
INSTALL: Final = "pip install 'farflung[llama-cpp]' (a C++ compiler builds it; the build decides what it computes on)"
_AT_ONCE, _PART = 2048, 512
"""Tokens that it is given at once, and that go through the model together."""
_GPU: Final = 1
"""GGML_BACKEND_DEVICE_TYPE_GPU."""
_ALL_LAYERS: Final = 1_000_000
_ERROR: Final = 4
"""GGML_LOG_LEVEL_ERROR."""
_last_error: list[str] = []


class Fed(NamedTuple):
    """A token on its way into a text."""

    token: int
    position: int
    """In its text, from 0."""
    text: int
    """Number of the text."""
    is_wanted: bool
    """Whether the logits after it are."""


def library() -> Any:
    """The functions of llama.cpp. Raises ConfigError where the package is missing or does not load."""
    try:
        from llama_cpp import llama_cpp as found
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        missing = getattr(error, "name", None) or "llama_cpp"
        raise ConfigError(f"the engine llama.cpp cannot load the package {missing} ({error}); {INSTALL}") from error
    if not _last_error:
        _last_error.append("it said nothing")
        found.llama_log_set(_callback(found), ctypes.c_void_p(0))
        found.llama_backend_init()
    return found


_kept_callbacks: list[Any] = []


def _callback(found: Any) -> Any:
    """Keeps the last error that llama.cpp tells, and shows nothing."""

    def keep(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            _last_error[0] = text.decode(errors="replace").strip()

    _kept_callbacks.append(found.llama_log_callback(keep))
    return _kept_callbacks[-1]


def device_kind(asked: str) -> str:
    """The kind of device that this build computes on, as ggml calls it: cpu, cuda, vulkan, mtl. Raises ConfigError.

    `asked` is as torch has it; auto takes an accelerator where the build has one.
    """
    lib = library()
    found = _accelerator() if asked != "cpu" and lib.llama_supports_gpu_offload() else ""
    if asked not in ("auto", "cpu") and not found:
        raise ConfigError(
            f"asked for device {asked!r}, but this build of llama.cpp has the processor alone; give --device auto, or "
            "build llama-cpp-python for it (CMAKE_ARGS=-DGGML_CUDA=on, -DGGML_VULKAN=on, -DGGML_METAL=on)"
        )
    return found or "cpu"


def _accelerator() -> str:
    from llama_cpp._ggml import libggml

    libggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    device = libggml.ggml_backend_dev_by_type(ctypes.c_int(_GPU))
    if not device:
        return ""
    libggml.ggml_backend_dev_name.restype = ctypes.c_char_p
    name = libggml.ggml_backend_dev_name(ctypes.c_void_p(device)).decode()
    return "".join(letter for letter in name.lower() if "a" <= letter <= "z")[:16]


def _has_tiles() -> bool:
    """Whether the build multiplies with Intel's AMX: compiled by GCC 12 that code ends the process (SIGSEGV), for the
    compiler takes the tiles' configuration for unused. Without the buffers that are made for it, none of it runs."""
    from llama_cpp._ggml import libggml

    found = getattr(libggml, "ggml_cpu_has_amx_int8", None)  # a build may keep kernels in libraries of their own
    return found is None or bool(found())


class LlamaModel:
    """The weights of one GGUF file, and the keys and values of the texts that it is reading."""

    def __init__(self, path: Path, device: str, threads: int) -> None:
        """Load the file; `device` is as `device_kind` takes it. Raises ConfigError where llama.cpp refuses it."""
        self._lib, self._threads, self._context, self._batch = library(), threads, None, None
        self._texts = self._tokens = 0
        options = self._lib.llama_model_default_params()
        kind = device_kind(device)
        options.n_gpu_layers = 0 if kind == "cpu" else _ALL_LAYERS
        options.split_mode, options.main_gpu = 0, int(device.partition(":")[2] or 0)
        options.use_extra_bufts = not _has_tiles()
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise ConfigError(f"llama.cpp does not load {path}: {_last_error[0]}")
        self.vocab = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))

    def make_room(self, texts: int, tokens: int) -> None:
        """Remember nothing, with room for so many texts of so many tokens each. Raises EngineAway where it has none."""
        if texts > self._texts or tokens > self._tokens:
            self._drop_context()
            self._texts, self._tokens = texts, math.ceil(tokens / 256) * 256
            self._context = self._lib.llama_init_from_model(self._model, self._options())
            if not self._context:
                self._texts = self._tokens = 0
                raise EngineAway(
                    f"llama.cpp has no room for {texts} texts of {tokens:,} tokens: {_last_error[0]}; lower --slots"
                )
            self._batch = self._lib.llama_batch_init(_AT_ONCE, 0, 1)
        self._lib.llama_memory_clear(self._memory, False)

    def _options(self) -> Any:
        options = self._lib.llama_context_default_params()
        options.n_ctx, options.n_seq_max = self._texts * self._tokens, self._texts
        options.n_batch, options.n_ubatch = _AT_ONCE, _PART
        options.n_outputs_max = self._texts
        options.n_threads = options.n_threads_batch = self._threads
        options.kv_unified = False
        return options

    @property
    def _memory(self) -> Any:
        return self._lib.llama_get_memory(self._context)

    def read(self, fed: Sequence[Fed]) -> torch.Tensor:
        """Read tokens; gives the logits that are wanted, float32 (B, V), in order. Raises EngineAway if it fails."""
        logits_BV = torch.empty(sum(one.is_wanted for one in fed), self.vocab)
        row = 0
        for start in range(0, len(fed), _AT_ONCE):
            part = fed[start : start + _AT_ONCE]
            self._decode(part)
            for index, one in enumerate(part):
                if one.is_wanted:
                    found = self._lib.llama_get_logits_ith(self._context, index)
                    logits_BV[row] = torch.from_numpy(np.ctypeslib.as_array(found, (self.vocab,)))
                    row += 1
        return logits_BV

    def _decode(self, fed: Sequence[Fed]) -> None:
        batch = self._batch
        assert batch is not None
        batch.n_tokens = len(fed)
        for index, one in enumerate(fed):
            batch.token[index], batch.pos[index], batch.logits[index] = one.token, one.position, one.is_wanted
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, one.text
        if code := self._lib.llama_decode(self._context, batch):
            raise EngineAway(f"llama.cpp cannot read {len(fed)} tokens (code {code}): {_last_error[0]}")

    def copy(self, text: int, other: int) -> None:
        """Let another number have the same text."""
        self._lib.llama_memory_seq_cp(self._memory, text, other, -1, -1)

    def forget(self, text: int) -> None:
        """Forget a text, so that its number is free."""
        self._lib.llama_memory_seq_rm(self._memory, text, -1, -1)

    def close(self) -> None:
        """Give the memory back; nothing works afterwards."""
        self._drop_context()
        if self._model:
            self._lib.llama_model_free(self._model)
        self._model = None

    def _drop_context(self) -> None:
        if self._context:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._context)
        self._context = None
