"""Chat messages become the text that transformers makes of them."""

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from farflung.protocol.errors import ConfigError
from farflung.tasks.chat import Chat
from farflung.tasks.model import Model

BASE = Path(__file__).parents[2] / "examples" / "base"
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Réponds <vite> & 'bien'.", "name": None},
    {"role": "user", "content": "1+1=", "facts": {"b": ["é", 2.5], "a": None}},
    {"role": "assistant", "content": "2", "reasoning": "one and one"},
    {"role": "user", "content": "2+2="},
]
MARKED = """{%- if messages[0].role != 'system' -%}
<|im_start|>system
You help.<|im_end|>
{% endif %}
{%- for message in messages %}
<|im_start|>{{ message['role'] }}
{{ message.content | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
TEMPLATES = {
    "marked": MARKED,
    "generation": """{% for m in messages %}{% if m.role == 'assistant' %}
  {% generation %}{% set seen = m.content %}{{ seen }}{{ eos_token }}{% endgeneration %}
{% else %}{{ m.role }}: {{ m.content }}
{% endif %}{% endfor %}{{ seen }}""",
    "break": """{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% if loop.index > 2 %}
{% break %}{% endif %}{{ m.content }}{% endfor %}""",
    "json": "{{ messages[-3].facts | tojson }} {{ messages | tojson(indent=2) }} {{ messages[0].content | tojson }}",
    "tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ image_token }}|{{ sep_token }}",
    "absent": "{{ tools is none }} {{ documents is none }} {{ 'name' in messages[0] }} {{ add_bos_token is defined }}",
    "thoughts": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }};{% endfor %}",
    "namespace": """{% set ns = namespace(n=0) %}{% for m in messages if m.role == 'user' %}
{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }} {{ dict(a=1) }}
{% macro say(x) %}<{{ x }}>{% endmacro %}{{ say(messages[-1]['content'].split('+')[0]) }}
{{ messages[::-1][0].role }}""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer without a template."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, tmp_path / name)
    settings(tmp_path, image_token="<image>", add_bos_token=False)
    return tmp_path


def settings(folder: Path, *without: str, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if name not in without}))


def text(folder: Path, messages: list[dict[str, Any]] = TALK) -> str:
    return Chat(str(folder), json.loads((folder / "tokenizer_config.json").read_text())).text(messages)


def theirs(folder: Path, messages: list[dict[str, Any]] = TALK) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_renders_what_transformers_renders(folder: Path, template: str) -> None:
    settings(folder, chat_template=template)
    assert text(folder) == theirs(folder)
    assert text(folder, TALK[1:]) == theirs(folder, TALK[1:])


def test_the_file_of_its_own_counts_before_the_settings(folder: Path) -> None:
    settings(folder, chat_template="old {{ messages[0].content }}")
    (folder / "chat_template.jinja").write_bytes(MARKED.replace("\n", "\r\n").encode())
    assert text(folder) == theirs(folder)
    assert "old" not in text(folder)


def test_of_several_templates_the_default_is_taken(folder: Path) -> None:
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": MARKED}]
    settings(folder, chat_template=named)
    assert text(folder) == theirs(folder)
    assert "rag" not in text(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    (folder / "chat_template.jinja").write_text("file {{ messages[0].role }}")
    assert text(folder) == theirs(folder) == "file system"
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="rag and none that is named default"):
        text(folder)


def test_special_tokens_of_older_models_have_a_file_of_their_own(folder: Path) -> None:
    settings(folder, "bos_token", "unk_token", chat_template=TEMPLATES["tokens"], eos_token="<wrong>")
    tokens = {"bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": "<eos>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    assert text(folder) == theirs(folder) == "<bos>|<eos>|<pad>|<unk>|<image>|"
    added = {"2": {"content": "<eos>", "special": True}}
    settings(folder, added_tokens_decoder=added, eos_token="<eos>")
    assert text(folder) == theirs(folder) == "|<eos>|<pad>||<image>|", "the other file is not read then"


def test_a_template_knows_the_date(folder: Path) -> None:
    settings(folder, chat_template="{{ strftime_now('%Y') }}")
    assert abs(int(text(folder)) - datetime.now().year) <= 1


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('No system message, please') }}", "No system message, please; "),
        ("{% for m in messages %}", "endfor"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages[0].nothing.more }}", "no attribute 'nothing'"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        (5, "int and no text"),
        ("", "no chat template"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_one_sentence(folder: Path, template: Any, words: str) -> None:
    settings(folder, chat_template=template)
    with pytest.raises(ConfigError, match=words) as caught:
        text(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", ["1+1=", TALK], ids=["plain", "chat"])
def test_ids_are_those_of_transformers(folder: Path, prompt: Any) -> None:
    """Also where a training left a length to cut at and to fill up to in tokenizer.json."""
    settings(folder, chat_template="<bos>{{ messages[-1].content }}", add_bos_token=True)
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    padding = {"strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None}
    fields["padding"] = padding | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    fields["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(fields))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if isinstance(prompt, str):
        expected = tokenizer(prompt)["input_ids"]
    else:
        expected = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    assert Model(str(folder)).prompt_ids(prompt) == expected
    assert len(expected) >= 4
