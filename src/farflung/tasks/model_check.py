"""Coordinator: why a base model cannot be trained, as far as its files tell; before a run is founded. No torch."""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from farflung.numerics.weight_files import Entry, entries, is_same, refuse_infinite, refuse_quantised
from farflung.protocol.errors import ConfigError
from farflung.protocol.messages import MOST_END_TOKENS
from farflung.tasks.model import Model

log = logging.getLogger(__name__)
LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
"""Fields of config.json that say how many positions a model has."""
TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|positions_embed)\.weight$")
"""Names of the tensor of a model that learned its positions one by one, and so has none beyond them."""
SPARE_ROWS = 2
"""By how many rows such a table is longer than its config.json says (OPT's)."""
FIXED = ("gpt2", "openai-gpt", "opt", "gpt_neo", "gpt_bigcode", "biogpt", "gptj", "codegen", "ctrl", "mpt")
"""Model types that end at their last position, learned or not, for weights that are not here yet."""


LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
"""The number of a layer in the names of its tensors."""
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")


def refuse_unfit(model: Model, say: Callable[[str], object] | None = None) -> None:
    """Raise ConfigError for a model that no role could work with.

    Every value of its weights is looked at where `say` can be told that it takes a while.
    """
    if not model.config.get("model_type"):
        raise ConfigError(
            f"config.json of model {model.path!r} names no model_type; take the file from the model's own folder"
        )
    _refuse_unknown(model)
    refuse_quantised(model.config, model.path)
    _refuse_ends(model)
    _refuse_padding(model)
    _refuse_large_tokenizer(model)
    stored = entries(model.path)
    _refuse_gaps(model, stored)
    if say is not None:
        refuse_infinite(stored, say)


def _refuse_unknown(model: Model) -> None:
    """Of a kind that transformers does not know. Its tables are read as text: to import them takes seconds."""
    kind, found = str(model.config["model_type"]), find_spec("transformers")
    if found is None or found.origin is None:
        return  # a coordinator by itself has no use for it
    tables = [table.read_text(encoding="utf-8") for table in Path(found.origin).parent.glob("models/auto/*auto*.py")]
    if any('"llama"' in table for table in tables) and not any(f'"{kind}"' in table for table in tables):
        own = "; code of its own (auto_map) is never run" if "auto_map" in model.config else ""
        raise ConfigError(
            f"config.json of model {model.path!r} names the model_type {kind!r}, which transformers does not "
            f"know{own}; take a model of a kind that it knows, or a later transformers"
        )


def refuse_long(model: Model, prompts: Iterable[int], max_new_tokens: int) -> None:
    """Raise ConfigError for texts that go beyond a model's last position, given the tokens of each prompt.

    A warning where the model goes on beyond what it was trained on.
    """
    longest = max(prompts, default=0)
    named = ((name, model.text_config.get(name)) for name in LIMITS)
    name, limit = next(((name, limit) for name, limit in named if isinstance(limit, int) and limit > 0), ("", 0))
    if not limit or longest + max_new_tokens <= limit:
        return
    text = (
        f"a prompt of {longest} tokens and generate.max_new_tokens = {max_new_tokens} come to "
        f"{longest + max_new_tokens} tokens, but model {model.path!r} has {limit} positions ({name} in config.json)"
    )
    if _ends_there(model, limit):
        raise ConfigError(
            f"{text}; lower generate.max_new_tokens, leave out long tasks, or take a model with more positions"
        )
    log.warning("%s: beyond them it was not trained", text)


def _ends_there(model: Model, limit: int) -> bool:
    if model.config.get("model_type") in FIXED:
        return True
    sizes = range(limit, limit + SPARE_ROWS + 1)
    return any(TABLE.search(name) and one.shape[0] in sizes for name, one in entries(model.path).items())


def _refuse_ends(model: Model) -> None:
    ends = model.ends
    if not ends:
        raise ConfigError(
            f"model {model.path!r} names no end token, its eos_token_id is an empty list; write there which token ends "
            "a text"
        )
    if len(ends) > MOST_END_TOKENS:
        raise ConfigError(
            f"model {model.path!r} names {len(ends)} end tokens and at most {MOST_END_TOKENS} work; name fewer in "
            "eos_token_id of its generation_config.json"
        )
    for token in ends:
        _refuse_stranger(model, "eos_token_id", token, 0, "name the token that ends a text there")


def _refuse_padding(model: Model) -> None:
    for fields in (model.config, model.text_config):
        if (token := fields.get("pad_token_id")) is not None:
            _refuse_stranger(model, "pad_token_id", token, -model.vocab, "write null there")


def _refuse_stranger(model: Model, name: str, token: Any, least: int, mend: str) -> None:
    if not isinstance(token, int) or isinstance(token, bool) or not least <= token < model.vocab:
        raise ConfigError(
            f"model {model.path!r} has {name} {token!r}, which is no id of its vocabulary (0 to {model.vocab - 1}); "
            f"{mend}"
        )


def _refuse_large_tokenizer(model: Model) -> None:
    text, token = max(
        model.tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda one: one[1], default=("", 0)
    )
    if token >= model.vocab:
        raise ConfigError(
            f"the tokenizer of model {model.path!r} has token {text!r} with id {token}, but the embedding ends at "
            f"{model.vocab - 1}; resize the embedding (model.resize_token_embeddings), or take the tokenizer that "
            "belongs to the model"
        )


def _refuse_gaps(model: Model, stored: Mapping[str, Entry]) -> None:
    """Raise ConfigError for faults that names and shapes show; a role that has torch finds the rest, a while later."""
    layers = model.text_config.get("num_hidden_layers") or model.text_config.get("n_layer")
    found = {int(match[1]) for name in stored if (match := LAYER.search(name))}
    if found and isinstance(layers, int) and (absent := sorted(set(range(layers)) - found)):
        raise ConfigError(
            f"the weights of model {model.path!r} lack layer {absent[0]} of the {layers} of its config.json; take the "
            "whole checkpoint and the config.json that belongs to it"
        )
    embeddings = [name for name in stored if EMBEDDING.search(name)]
    if len(embeddings) == 1:
        _refuse_misfit_ends(model, stored, embeddings[0])


def _refuse_misfit_ends(model: Model, stored: Mapping[str, Entry], name: str) -> None:
    embedding, is_tied = stored[name], model.config.get("tie_word_embeddings")
    if embedding.shape[:1] != (model.vocab,):
        raise ConfigError(
            f"tensor {name} of model {model.path!r} has the shape {list(embedding.shape)}, by config.json vocab_size "
            f"is {model.vocab}; weights and config.json belong to different models, take both from the same"
        )
    heads = [other for other in stored if HEAD.search(other)]
    if is_tied is False and not any(one.shape == embedding.shape for other, one in stored.items() if other != name):
        raise ConfigError(
            f"the weights of model {model.path!r} lack an output head (lm_head.weight); take the whole checkpoint, or "
            "write tie_word_embeddings: true into its config.json where the head is the embedding"
        )
    if is_tied is True and heads and not is_same(embedding, stored[heads[0]]):
        raise ConfigError(
            f"tensors {heads[0]} and {name} of model {model.path!r} differ, though config.json ties them; set "
            "tie_word_embeddings to false there, or take the model's own files"
        )
