"""Coordinator: the base model's small files, tokenizer and chat template. No torch."""

import hashlib
import json
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from farflung.numerics.model_files import parse, read, read_json
from farflung.protocol.errors import ConfigError
from farflung.tasks.chat import Chat

SAVERS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Fields of config.json that tell how it was saved."""


class Model:
    """A base model by its folder or hub id. Raises ConfigError where its small files cannot be read."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.config = self._json("config.json")
        self.generation = read_json(path, "generation_config.json") or {}
        self._settings = read_json(path, "tokenizer_config.json") or {}
        self.tokenizer = self._tokenizer()

    @property
    def text_config(self) -> dict[str, Any]:
        """The fields of config.json that describe the language model, also of one that sees."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def vocab(self) -> int:
        """Size of the model's vocabulary, the largest id any token may have plus one."""
        size = self.config.get("vocab_size") or self.text_config.get("vocab_size")
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"config.json of model {self.path} has vocab_size = {size}; write the embedding's rows")
        return size

    @property
    def digest(self) -> str:
        """SHA-256 of what config.json says of the architecture, whichever program saved it."""
        fields = {name: value for name, value in self.config.items() if name not in SAVERS}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    @property
    def ends(self) -> list[Any]:
        """The values in the place of the end tokens; `refuse_unfit` looks whether they are some."""
        for source in (self.generation, self.config, self.text_config):
            if (eos := source.get("eos_token_id")) is not None:
                return eos if isinstance(eos, list) else [eos]
        raise ConfigError(
            f"model {self.path} names no eos_token_id in config.json or generation_config.json; write there which "
            "token ends a text"
        )

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a rollout."""
        return frozenset(self.ends)

    def prompt_ids(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """A prompt as token ids; chat messages go through the model's own template, in a sandbox."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt).ids
        return self.tokenizer.encode(self._chat.text(prompt), add_special_tokens=False).ids

    def file(self, name: str) -> bytes | None:
        """A small file of the model, from its folder or the hub."""
        return read(self.path, name)

    @cached_property
    def _chat(self) -> Chat:
        return Chat(self.path, self._settings)

    def _json(self, name: str) -> dict[str, Any]:
        fields = read_json(self.path, name)
        if fields is None:
            raise ConfigError(
                f"model path {self.path!r} has no {name}, or it cannot be had from the hub now; name a folder of a "
                "Hugging Face causal LM or its hub id"
            )
        return fields

    def _tokenizer(self) -> Tokenizer:
        data = read(self.path, "tokenizer.json")
        if data is None:
            raise ConfigError(
                f"model path {self.path!r} has no tokenizer.json; copy it from the model that this one was made from, "
                f"or write it: {SAVE.format(path=self.path)}"
            )
        parse(data, f"tokenizer.json of model {self.path!r}")
        try:
            tokenizer = Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises no other
            raise ConfigError(
                f"tokenizer.json of model {self.path!r} describes no tokenizer ({error}); download it again"
            ) from error
        tokenizer.no_truncation()  # left there by a program that saved it in the middle of a training
        tokenizer.no_padding()
        return tokenizer


SAVE = (
    "python -c \"from transformers import AutoTokenizer; AutoTokenizer.from_pretrained('{path}').save_pretrained("
    "'{path}')\""
)
