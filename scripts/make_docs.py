"""Write the generated documentation: pages that are whole, and the marked parts of others.

    python scripts/make_docs.py

Everything comes from the code and the texts themselves: settings from `config.fields()`, commands from the docstrings
in `cli/`, the tree from the first line of each module's docstring, in the order of the layers in pyproject.toml,
routes from the coordinator's table, messages from their source, errors and lifecycles from their tables, examples and
test vectors by computing them, the indexes of decisions and of dev/LOG.md from their headings.
`tests/unit/test_docs.py` and `tests/unit/test_readme_tree.py` fail when a page is not what this writes.
"""

import ast
import base64
import inspect
import json
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

from farflung import config
from farflung.cli import app
from farflung.coordinator.context import Context
from farflung.coordinator.routes import routes as routes_of
from farflung.engine import noise
from farflung.net import session
from farflung.net.server import Route
from farflung.protocol import errors, identity, messages, numerics, seeds, states
from farflung.tasks.assign import task_order

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "src" / "farflung"
EXAMPLE_NONCE = "AAECAwQFBgcICQoLDA0ODw"
EXAMPLE_CREATED = 1_795_460_000
EXAMPLE_PATH = "/v1/runs/demo/leases"


def main() -> None:
    """Write every page that is not what the code says."""
    for path, text in pages().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def pages() -> dict[Path, str]:
    """Each page that is generated, in whole or in part, as it should be."""
    whole = {
        "config.md": config_page(),
        "cli.md": cli_page(),
        "tree.md": tree_page(),
        "decisions/README.md": decisions_page(),
    }
    marked = [DOCS / "protocol.md", ROOT / "README.md", ROOT / "dev" / "LOG.md"]
    return {DOCS / name: text for name, text in whole.items()} | {path: filled(path.read_text()) for path in marked}


# --- settings --------------------------------------------------------------------------------------------------------

INTRO = """# Settings

<!-- Written by scripts/make_docs.py from the fields in src/farflung/config/. Change those, then run it. -->

A run is described by one tree of settings. Four places can say something, each overrides the one before:

1. the defaults below;
2. the TOML file that the command names (or a `config.json` that an earlier run left);
3. the environment: `FARFLUNG_SECTION__KEY=value`, for example `FARFLUNG_LEARN__LR=3e-4`;
4. flags: `--section.key value` or `--section.key=value`, for example `--learn.lr 3e-4`.

Values from the environment and from flags are read as JSON, and as plain text where they are none:
`--learn.lr 3e-4`, `--run.reproducible true`, `--env.args '{"digits": 2}'`, `--run.name mine`.

An unknown key is an error that names the nearest known one. `model.path` and the file in `env.name` are looked up
beside the TOML file first; `run.dir` is relative to where the command is given. `farflung run` writes the resolved
settings to `config.json` in the run's folder; every process that it starts reads that file. The roles that are
started by hand read what their own command names, so give all of them the same.

The settings under *Advanced* have defaults that serve a first run.
"""

SECTIONS = {
    "run": "What the run is called, how long it goes on and what chance depends on.",
    "model": "The base model and the arithmetic that everybody must agree on.",
    "env": "What the run trains on; [envs.md](envs.md) says which environments there are.",
    "generate": "How rollouts are sampled. Workers are told by their lease.",
    "learn": "The trainer: groups, loss, optimizer, memory, checkpoints.",
    "lease": "How work is handed out and when it is taken back.",
    "trust": "How much is audited and when a node is ejected.",
    "eval": "Evaluation on held-out tasks by the validators, greedily and by samples for pass@k.",
    "coordinator": "Where the coordinator listens and keeps its state, and whom it trusts with which role.",
    "worker": "Workers of `farflung run`. A worker that is started by hand takes flags of its own.",
    "idle": "When a machine works, as its owner wishes: workers of `farflung run`. `farflung join` has flags,\n"
    "and `farflung idle` keeps the same settings in `idle.toml` beside a node's key.",
    "validator": "Validators.",
    "relay": "Relays of `farflung run`. A relay that is started by hand takes flags of its own.",
    "scorer": "The scorer and its child processes.",
    "swarm": "What `farflung run` starts on this machine.",
    "chaos": "Faults of `farflung chaos`.",
    "prices": "What an hour of each role costs, for `cost_usd` in the summary.",
    "sinks": "Where step metrics go besides `metrics.jsonl`; the package named must be installed.",
}


def config_page() -> str:
    """docs/config.md."""
    parts = [INTRO]
    for name, field in config.Config.model_fields.items():
        section = typing.cast(type[config.Section], field.annotation)
        parts.append(f"## `{name}`\n\n{SECTIONS.get(name, '')}\n\n{_settings(section, name + '.')}")
    parts.append(f"### Each of `swarm.cheats`\n\n{_settings(config.Cheat, '')}")
    return "\n".join(parts)


def _settings(section: type[config.Section], prefix: str) -> str:
    rows: dict[bool, list[tuple[str, ...]]] = {False: [], True: []}
    for key, field in config.fields(section, prefix):
        meaning = field.description + _bounds(field)
        rows[config.is_advanced(field)].append(
            (f"`{key}`", _type(field.annotation), f"`{_value(field.default)}`", meaning)
        )
    tables = [table(("key", "type", "default", "meaning"), some) for some in rows.values() if some]
    return "\n*Advanced*\n\n".join(tables)


def _type(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{_value(choice)}`" for choice in args)
    if origin is tuple:
        return "list of text" if args[0] is str else "list of tables"
    if origin is dict:
        return "table"
    return {Path: "path", str: "text", int: "whole number", float: "number", bool: "true or false"}[annotation]


def _value(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value)


def _bounds(field: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    said = [
        f"{sign} {getattr(part, name)}"
        for part in field.metadata
        for name, sign in signs.items()
        if hasattr(part, name)
    ]
    said += [f"matches `{part.pattern}`" for part in field.metadata if getattr(part, "pattern", None)]
    return f" ({', '.join(said)})" if said else ""


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


# --- commands --------------------------------------------------------------------------------------------------------

CLI_INTRO = """# Commands

<!-- Written by scripts/make_docs.py from the docstrings in src/farflung/cli. Change those, then run it. -->

`farflung --help` shows these groups, `farflung COMMAND --help` the options of one command. Positional arguments may be
given by name too (`--config run.toml`). `FLAGS` are settings of the run as `--section.key value`;
[config.md](config.md) has all of them. The exit code is 0, or 2 where the user can mend the cause, which is then told
in one sentence, or 1 where the command ran and the outcome is bad.
"""


def cli_page() -> str:
    """docs/cli.md."""
    names = [name for name in app if not name.startswith("-")]
    groups = {group.name: group for name in names for group in app[name].group}.values()
    parts = [CLI_INTRO]
    for group in sorted(groups, key=lambda group: group.sort_key):
        parts.append(f"## {group.name}\n")
        members = [name for name in names if group in app[name].group]
        parts += [_command(name) for name in sorted(members, key=lambda name: (app[name].sort_key or 9, name))]
    return "\n".join(parts)


def _command(name: str) -> str:
    text, meanings = told(inspect.getdoc(app[name].default_command) or "")
    positional, required, options = ["farflung", name], list[str](), list[tuple[str, ...]]()
    for argument in app[name].assemble_argument_collection():
        if is_dataclass(argument.hint):  # its fields follow, each with what the dataclass says of it
            meanings |= told(inspect.getdoc(argument.hint) or "")[1]
            continue
        field = argument.field_info
        meaning = meanings.get(field.name) or argument.parameter.help or ""
        if field.is_positional:
            word = (argument.name.lstrip("-") + "…" * (field.kind is field.VAR_POSITIONAL)).upper()
            positional.append(word if argument.required else f"[{word}]")
            if field.kind is not field.VAR_POSITIONAL:
                options.append((f"`{word}`", _takes_option(argument.hint), "", meaning))
        else:
            default = "required" if argument.required else _option_default(field.default)
            required += [argument.name, argument.name.lstrip("-").upper()] if argument.required else []
            options.append((f"`{argument.name}`", _takes_option(argument.hint), default, meaning))
    usage = " ".join(positional + required)
    return f"### `{name}`\n\n    {usage}\n\n{text}\n\n{table(('argument', 'takes', 'default', 'meaning'), options)}"


def told(docstring: str) -> tuple[str, dict[str, str]]:
    """The prose of a command's docstring, and the meaning of each parameter."""
    prose, _, listed = docstring.partition("Parameters\n----------\n")
    found = re.findall(r"^(\w+)\n((?:    .*\n?)+)", listed, re.MULTILINE)
    return prose.strip(), {name: " ".join(text.split()) for name, text in found}


def _takes_option(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "text"
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not types.NoneType]
    return {bool: "nothing"}.get(kinds[0]) or _type(kinds[0])


def _option_default(value: Any) -> str:
    return "" if value in ("", None, (), False) else f"`{value}`"


# --- the tree --------------------------------------------------------------------------------------------------------

TREE_INTRO = """# The tree

<!-- Written by scripts/make_docs.py from the first line of each docstring. Change those, then run it. -->

Every module under `src/farflung`, with the first line of its docstring. Packages come in the order of their imports,
which is the order of trust: each may import those below it and none above it (`[tool.importlinter]` in pyproject.toml).
"""


def layers() -> list[list[str]]:
    """Top-level packages and modules from the commands down, those of one layer together."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    listed = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[name.strip() for name in re.split(r"[|:]", layer)] for layer in listed]


def phrase(path: Path) -> str:
    """The first line of the docstring of a module, or of a package by its folder; empty where there is none."""
    file = path / "__init__.py" if path.is_dir() else path
    text = ast.get_docstring(ast.parse(file.read_text())) if file.exists() else None
    return (text or "").partition("\n")[0]


def module_paths() -> list[Path]:
    """Packages and modules at the top, in the order of the layers."""
    order = [name for layer in layers() for name in layer]
    found = [path for path in PACKAGE.iterdir() if _is_told(path) and path.name != "__init__.py"]
    return sorted(found, key=lambda path: (order.index(path.stem) if path.stem in order else len(order), path.stem))


def _is_told(path: Path) -> bool:
    return path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__" and any(path.rglob("*.py")))


def tree_page() -> str:
    """docs/tree.md."""
    parts = [TREE_INTRO]
    for path in module_paths():
        link = path.relative_to(ROOT)
        slash = "/" if path.is_dir() else ""
        parts.append(f"## [`{path.name}{slash}`](../{link})\n\n{phrase(path)}\n")
        if path.is_dir():
            parts.append("\n".join(_branch(path, "")) + "\n")
    return "\n".join(parts)


def _branch(folder: Path, indent: str) -> Iterator[str]:
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        link = f"{indent}- [`{path.name}"
        if path.suffix == ".py" and path.name != "__init__.py":
            yield f"{link}`](../{path.relative_to(ROOT)}) {phrase(path)}"
        elif path.is_dir() and _is_told(path):
            yield f"{link}/`](../{path.relative_to(ROOT)}) {phrase(path)}".rstrip()
            yield from _branch(path, indent + "  ")
        elif path.is_dir() and any(one.suffix != ".pyc" for one in path.rglob("*") if one.is_file()):
            kinds = sorted({file.suffix[1:] for file in path.rglob("*") if file.suffix})
            yield f"{link}/`](../{path.relative_to(ROOT)}) Files: {', '.join(kinds)}."
    data = sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix not in (".py", ".pyc"))
    if data:
        yield f"{indent}- and {', '.join(f'`{name}`' for name in data)}"


def _packages() -> str:
    paths = module_paths()
    names = [path.name + "/" * path.is_dir() for path in paths]
    width = max(map(len, names))
    phrases = [phrase(path).split(". ")[0].rstrip(".") for path in paths]
    lines = [f"├── {name:<{width}}  {said}" for name, said in zip(names, phrases, strict=True)]
    return "\n".join(["```text", "src/farflung/", *lines, "```"])


# --- indexes ---------------------------------------------------------------------------------------------------------

DECISIONS_INTRO = """# Decisions

<!-- Written by scripts/make_docs.py from the titles in this folder. Change those, then run it. -->

One page for each choice that could have gone another way: context, options and their figures, the choice, and what
would change it. A record stays when its choice is superseded; its status then says by which.
"""
TITLE = re.compile(r"# (\d{4}) (.+)\n")
STANDING = re.compile(r"\*\*Status\.\*\* (.+)\n")


def decisions() -> list[Path]:
    """The records, by number."""
    return sorted(path for path in (DOCS / "decisions").glob("*.md") if path.name != "README.md")


def decisions_page() -> str:
    """docs/decisions/README.md."""
    rows: list[tuple[str, ...]] = []
    for path in decisions():
        text = path.read_text()
        title, standing = TITLE.match(text), STANDING.search(text)
        if title is None:
            raise ValueError(f"{path.name} does not begin with `# NUMBER Title`")
        rows.append((f"[{title[1]}]({path.name})", title[2], standing[1].rstrip(".") if standing else "Holds"))
    return f"{DECISIONS_INTRO}\n{table(('', 'decision', 'status'), rows)}"


ENTRY = re.compile(r"^## (\d{4}-\d\d-\d\d) (.+) · (.+)$", re.MULTILINE)


def _log() -> str:
    entries = ENTRY.findall((ROOT / "dev" / "LOG.md").read_text())
    return "\n".join(f"- {date} {title}: **{verdict}**" for date, title, verdict in entries)


# --- the protocol ----------------------------------------------------------------------------------------------------

MARK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """A page with every marked part made anew."""
    return MARK.sub(lambda found: f"{found[1]}\n{PARTS[found[2]]()}\n{found[3]}", page)


def routes() -> list[Route]:
    """Every route of the coordinator."""
    return routes_of(Context.__new__(Context))


def _routes() -> str:
    rows = [
        (
            f"`{route.method} {route.path}`",
            _who(route),
            _takes(route),
            f"`{route.gives.__name__}`" if route.gives else "see right",
            inspect.getdoc(route.handler) or "",
        )
        for route in routes()
    ]
    return table(("route", "who", "takes", "gives", "what it does"), rows)


def _who(route: Route) -> str:
    if not route.signed:
        return "anybody, unsigned"
    if route.path.startswith("/v1/admin/"):
        return "the operator"
    role = re.search(r'\brequire\(call, "(\w+)"\)', inspect.getsource(route.handler))
    return role[1] if role else "any registered node" if route.path != "/v1/nodes" else "any key"


def _takes(route: Route) -> str:
    what = "bytes" if route.raw else f"`{route.takes.__name__}`" if route.takes else "nothing"
    return what if what == "nothing" else f"{what}, at most {_size(route.limit_bytes)}"


def _size(size_bytes: int) -> str:
    for unit, width in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size_bytes >= 1 << width:
            return f"{size_bytes >> width} {unit}"
    return f"{size_bytes} bytes"


def _errors() -> str:
    rows = [
        (f"`{code}`", str(cls.status), f"`{cls.__name__}`", inspect.getdoc(cls) or "")
        for code, cls in sorted(errors.by_code().items(), key=lambda item: (item[1].status, item[0]))
    ]
    extra = [("`no-such-method`", "405", "`Refusal`", "The path exists, but not with this method.")]
    return table(("code", "status", "class", "meaning"), rows + extra)


def _lifecycles() -> str:
    parts: list[str] = []
    for noun, life in states.LIFECYCLES.items():
        rows = [
            (f"`{before}`", ", ".join(f"`{after}`" for after in following) or "nothing: final")
            for before, following in life.items()
        ]
        parts.append(f"**{noun}**, which begins as `{states.first(noun)}`\n\n" + table(("from", "may become"), rows))
    return "\n".join(parts)


# --- messages, out of their source -----------------------------------------------------------------------------------

SUBJECTS = (
    messages.limits,
    messages.nodes,
    numerics,
    messages.descriptor,
    messages.weights,
    messages.leases,
    messages.submissions,
    messages.heartbeats,
    messages.scores,
    messages.audits,
    messages.steps,
    messages.status,
)
"""The files of the messages, in the order in which the page tells of them."""
STATEMENTS = [node for module in SUBJECTS for node in ast.parse(inspect.getsource(module)).body]
EXTENDED = {node.name: node for node in STATEMENTS if isinstance(node, ast.ClassDef) and node.name == "Numerics"}
ALIASES = {
    node.targets[0].id: node.value
    for node in STATEMENTS
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Subscript)
}
"""Names that the messages give to types, with what they stand for."""
NO_LINE_FEED = r"(?!\n)$"
"""How Python says that nothing follows; elsewhere `$` says it."""
LIMITED_BY = ("MAX_TOKENS", "MAX_SAMPLES", "MOST_END_TOKENS", "MOST_DEVICES")
LIMITS = {name: getattr(messages, name) for name in LIMITED_BY} | {"SEED_BITS": seeds.SEED_BITS}


def message_types() -> dict[str, ast.ClassDef]:
    """Every wire type by name: messages, and the two structs that live beside them."""
    found = {node.name: node for node in STATEMENTS if isinstance(node, ast.ClassDef) and node.name != "Message"}
    for cls in (session.Index, identity.Signed):
        found[cls.__name__] = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(cls)).body[0])
    return found


def message_fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr, ast.expr | None, str]]:
    """Name, type, default and documentation of each field, those of another wire type that it extends first."""
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in EXTENDED:
            yield from message_fields(EXTENDED[base.id])
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            yield field.target.id, field.annotation, field.value, _text_of(after)


def _text_of(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return node.value.value
    return ""


def _messages() -> str:
    parts: list[str] = []
    for name, node in message_types().items():
        rows = [
            (f"`{field}`", wire_type(kind), "required" if default is None else f"`{_default(default)}`", doc)
            for field, kind, default, doc in message_fields(node)
        ]
        fields = table(("field", "type", "default", "meaning"), rows) if rows else "No fields.\n"
        parts.append(f"#### `{name}`\n\n{ast.get_docstring(node)}\n\n{fields}")
    return "\n".join(parts)


def _default(value: ast.expr) -> str:
    if isinstance(value, ast.Call):
        return "{}"
    found = ast.literal_eval(value)
    return _value(found.decode() if isinstance(found, bytes) else found)


def wire_type(kind: ast.expr) -> str:
    """A type as it is on the wire."""
    match kind:
        case ast.Constant(value=None):
            return "null"
        case ast.Name(id=name):
            return {"str": "text", "int": "integer", "float": "float", "bool": "boolean", "bytes": "bytes"}.get(
                name, name if name in ALIASES else f"`{name}`"
            )
        case ast.BinOp(left=left, right=right):
            return f"{wire_type(left)} or {wire_type(right)}"
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            items = choices.elts if isinstance(choices, ast.Tuple) else [choices]
            return " or ".join(f"`{_value(ast.literal_eval(item))}`" for item in items)
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[inner, ast.Call(keywords=bounds)])):
            return f"{wire_type(inner)} ({', '.join(map(_bound, bounds))})"
        case ast.Subscript(value=ast.Name(id="list"), slice=inner):
            return f"list of {wire_type(inner)}"
        case ast.Subscript(
            value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[inner, ast.Constant(value=EllipsisType())])
        ):
            return f"list of {wire_type(inner)}"
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[key, value])):
            return f"map from {wire_type(key)} to {wire_type(value)}"
    raise ValueError(f"no words for the type {ast.unparse(kind)}")


def _bound(keyword: ast.keyword) -> str:
    words = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "at least", "max_length": "at most"}
    if keyword.arg == "pattern":
        return f"matches `{ast.literal_eval(keyword.value).replace(NO_LINE_FEED, '$')}`"
    value = eval(compile(ast.Expression(keyword.value), "bound", "eval"), dict(LIMITS))  # our own source, a number
    return f"{words[str(keyword.arg)]} {value:,}" if isinstance(value, int) else f"{words[str(keyword.arg)]} {value:g}"


def _aliases() -> str:
    notes = {"Ids": "token ids, see Encoding", "Floats": "float32 values, see Encoding", "Seconds": "duration or time"}
    rows = [(name, wire_type(kind), notes.get(name, "")) for name, kind in ALIASES.items()]
    return table(("name", "type", "note"), rows)


# --- examples and vectors, computed ----------------------------------------------------------------------------------


def example_headers() -> tuple[identity.Key, bytes, dict[str, str], bytes]:
    """Key, body, headers and signature base of the worked example."""
    key = identity.Key(bytes(range(32)))
    body = b'{"slots":8,"wait_s":5.0}'
    digest = identity.content_digest(body)
    keyid = base64.urlsafe_b64encode(key.public).decode().rstrip("=")
    parameters = (
        f'("@method" "@path" "@query" "content-digest");created={EXAMPLE_CREATED};nonce="{EXAMPLE_NONCE}"'
        f';alg="ed25519";keyid="{keyid}";tag="{key.id}"'
    )
    base = identity.signature_base("POST", EXAMPLE_PATH, "", digest, parameters)
    headers = {
        "content-type": "application/json",
        "content-digest": digest,
        "signature-input": f"sig1={parameters}",
        "signature": f"sig1=:{base64.b64encode(key.sign(base)).decode()}:",
    }
    return key, body, headers, base


def _signing() -> str:
    key, body, headers, base = example_headers()
    sent = "\n".join(f"{name}: {value}" for name, value in headers.items())
    return f"""The private key is the 32 bytes 00 01 … 1f. Its public key and node id are

    {key.public.hex()}
    {key.id}

The request is `POST {EXAMPLE_PATH}` without a query, for a coordinator whose id happens to be the same, with the body

    {body.decode()}

The signature base, five lines joined by a line feed and without one at the end:

{_indented(base.decode())}

The request then carries

{_indented(sent)}
"""


def _sealing() -> str:
    key = identity.Key(bytes(range(32)))
    signed = identity.seal(key, "example", messages.Done(changed=1))
    return f"""With the same key, kind `example` and the document `Done(changed=1)`:

    payload      {signed.payload.hex()}
    signed       {(b"farflung" + bytes(1) + b"example" + bytes(1) + signed.payload).hex()}
    signature    {signed.signature.hex()}
"""


def _seeds() -> str:
    run = bytes(range(32))
    step = seeds.step_secret(run, 7)
    draw = seeds.derive(seeds.audit_key(step), "audit draw", "l0123456789ab", bytes(32), 2)
    return f"""    run secret                                           {run.hex()}
    step secret, step 7                                  {step.hex()}
    commitment                                           {seeds.commitment(step).hex()}
    seed of task "task-1", sample 3                      {seeds.sample_seed(step, "task-1", 3)}
    task key                                             {seeds.task_key(step).hex()}
    audit key                                            {seeds.audit_key(step).hex()}
    audit draw, lease "l0123456789ab", digest of 32
      zero bytes, index 2                                {draw.hex()}
      as a number                                        {(int.from_bytes(draw[:8], "big") >> 11) / 2**53:.12f}
    order of 10 tasks at step 7                          {" ".join(map(str, task_order(step, 7, 10)))}
"""


def _noise() -> str:
    lines: list[str] = []
    for seed, position in ((0, 0), (4086635469553891, 5), (2**53 - 1, 131_071)):
        (state,) = noise.row_states([seed], [position])
        hashes = noise.bits_numpy([seed], [position], 3)[0]
        values = noise.gumbel_numpy(hashes)
        lines.append(f"    seed {seed}, position {position}:  state = {state}")
        for token, (hash_, value) in enumerate(zip(hashes, values, strict=True)):
            lines.append(f"      token {token}   h = {hash_:>10}   g = {value:8.4f}")
    return "\n".join(lines) + "\n"


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


PARTS: dict[str, Callable[[], str]] = {
    "routes": _routes,
    "errors": _errors,
    "lifecycles": _lifecycles,
    "aliases": _aliases,
    "messages": _messages,
    "signing": _signing,
    "sealing": _sealing,
    "seeds": _seeds,
    "noise": _noise,
    "packages": _packages,
    "log": _log,
}


if __name__ == "__main__":
    main()
