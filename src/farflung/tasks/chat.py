"""Coordinator: chat messages as the text that a model was trained on, made by the template that comes with it.

The text is what `apply_chat_template` of transformers makes, without its import. A template comes with a model that
the operator chose, so it is rendered in a sandbox; its words on a conversation that it refuses reach the operator.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from farflung.numerics.model_files import find, read, read_json
from farflung.protocol.errors import ConfigError

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which people put a message's thoughts; templates read the first, some the second."""
NAMED = "additional_chat_templates"
"""Folder of a model's other templates."""
FAULTS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""Errors that a template can raise."""


class Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training on it alone; here its body is all that counts."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class Chat:
    """The chat template of a model and the special tokens that it may use."""

    def __init__(self, source: str, settings: Mapping[str, Any]) -> None:
        """`settings` are the fields of tokenizer_config.json."""
        self._source = source
        self._template = _template(source, settings)
        self._tokens = special_tokens(source, settings)

    def text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A conversation up to where the model is to answer. Raises ConfigError."""
        if not self._template:
            raise ConfigError(
                f"the environment gives chat messages, but model {self._source} has no chat template; take an "
                "instruction-tuned model, or put a chat_template.jinja into its folder"
            )
        if not messages:
            raise ConfigError("the environment gives a prompt without a message; give it at least one")
        try:
            return (
                _environment()
                .from_string(self._template)
                .render(
                    messages=[_said(message) for message in messages],
                    tools=None,
                    documents=None,
                    add_generation_prompt=True,
                    **self._tokens,
                )
            )
        except FAULTS as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ConfigError(
                f"the chat template of model {self._source} refuses a conversation of the roles {roles}: "
                f"{str(error) or type(error).__name__}; change the prompts of the environment, or the template"
            ) from error


def special_tokens(source: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by name, from tokenizer_config.json or where older models have them.

    special_tokens_map.json counts, and counts more, where tokenizer_config.json has no added_tokens_decoder.
    """
    fields = dict(settings)
    if "added_tokens_decoder" not in fields:
        fields |= read_json(source, "special_tokens_map.json") or {}
    if isinstance(extra := fields.get("extra_special_tokens"), dict):
        fields |= extra
    texts = {name: _text(value) for name, value in fields.items() if name.endswith("_token")}
    return {name: text for name, text in texts.items() if text is not None}


def _text(token: Any) -> str | None:
    """The text of a token that is given as such or as an object with it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _template(source: str, settings: Mapping[str, Any]) -> str:
    """The template: the files of its own before tokenizer_config.json, of several the default. Raises ConfigError."""
    found: Any = settings.get("chat_template")
    if isinstance(found, list):
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
    if named := _own_files(source):
        found = named
    if isinstance(found, dict):
        if "default" not in found:
            raise ConfigError(
                f"model {source} has the chat templates {', '.join(map(str, found))} and none that is named default; "
                "write the one to use into chat_template.jinja"
            )
        found = found["default"]
    if found is not None and not isinstance(found, str):
        raise ConfigError(f"the chat_template of model {source} is {type(found).__name__} and no text; mend its file")
    return found or ""


def _own_files(source: str) -> dict[str, str]:
    found: dict[str, str] = {}
    if (data := read(source, "chat_template.jinja")) is not None:
        found["default"] = _decoded(data, f"chat_template.jinja of model {source}")
    for path in sorted((Path(source) / NAMED).glob("*.jinja")):
        if find(source, f"{NAMED}/{path.name}") is not None:
            found[path.stem] = _decoded(path.read_bytes(), str(path))
    return found


def _decoded(data: bytes, what: str) -> str:
    """Text with line ends as Python reads them from a file. Raises ConfigError."""
    try:
        return data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is no UTF-8 text; save it as UTF-8") from error


def _said(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: no field that is None, its thoughts under each name that they go by."""
    fields = {name: value for name, value in message.items() if value is not None}
    thoughts = next((fields[name] for name in REASONING if name in fields), None)
    return fields if thoughts is None else {"thinking": thoughts, **fields, "reasoning_content": thoughts}


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that templates are written for."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Keys in their order and letters as they are, where Jinja's own escapes them for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
