"""Nodes of every role that send forbidden messages, changed first and signed then. For bench/fuzz.py."""

import asyncio
import json
import random
import re
import time
from collections import Counter, defaultdict, deque
from typing import Any

import msgspec

from farflung.audits import verdict
from farflung.config import Config
from farflung.protocol import messages as m
from farflung.protocol import wire
from farflung.protocol.digest import digest_of
from farflung.protocol.identity import Key, sign_request
from farflung.weights.manifest import KIND, target_digest
from load.clients import Line, simulated_key
from load.mutate import HEX, Chance, example

WORKERS, AT_ONCE, KEPT = 24, 16, 64
PAGES = ["/", "/nodes", "/rollouts", "/weights", "/ledger", "/story", "/story/{id}", "/static/{id}", "/metrics"]
QUERIES = ["sort=credit&order=down", "page=2", "id=l1", "status=held", "before=9", "q=%00", "page=99999999999999999999"]
ODD_HEADERS = [
    "range: bytes=0-1",
    "range: bytes=9-1",
    "content-type: text/plain",
    "content-type: application/msgpack; x",
]
ODD_HEADERS += [
    "accept: */*;q=x",
    "content-encoding: gzip",
    "cookie: \xff=\xfe",
    "host: [",
    "if-none-match: \xe9",
    "x: ",
]
SENDER = {"leases": "worker", "heartbeat": "worker", "scores": "scorer", "audits": "validator", "steps": "trainer"}
SENDER |= {"blobs": "trainer", "submissions": "trainer", "breaker": "operator", "rollback": "operator"}


class FuzzClients:
    """Workers, a trainer, a validator, a scorer and the operator, who all send what they should not."""

    def __init__(self, config: Config, address: tuple[str, int], tag: str, seed: int) -> None:
        self.address, self.tag, self.chance, self.random = address, tag, Chance(f"requests {seed}"), random.Random(seed)
        keys = config.folder / "keys"
        self.keys = {f"worker-{number}": simulated_key(seed, number) for number in range(WORKERS)}
        files = {"trainer": "trainer", "validator": "validator-1", "scorer": "scorer", "operator": "coordinator"}
        self.keys |= {role: Key.load_or_make(keys / file) for role, file in files.items()}
        self.leases: dict[str, m.Lease] = {}
        self.seen: defaultdict[str, deque[str]] = defaultdict(lambda: deque(maxlen=KEPT))
        """First letter, or # for digests → ids that the coordinator said."""
        self.statuses: Counter[str] = Counter()
        self.broken: list[str] = []
        self.routes: list[tuple[str, str, str]] = [("GET", path, "") for path in PAGES]

    async def arrive(self) -> None:
        """Register everybody, and read what may be asked."""
        line = Line(*self.address)
        document = json.loads((await line.ask(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n"))[2])
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                content = operation.get("requestBody", {}).get("content", {})
                reference = content.get(wire.JSON, {}).get("schema", {}).get("$ref", "raw" if content else "")
                self.routes += 4 * [(method.upper(), path, reference.rpartition("/")[2])]
        for name in self.keys:
            role = name.partition("-")[0]
            ask = m.Register(version=m.VERSION, role="worker" if role == "operator" else role)  # type: ignore[arg-type]
            await self.say(line, name, "POST", "/v1/nodes", wire.encode(ask))
        line.close()

    async def say(
        self, line: Line, name: str, method: str, path: str, body: bytes, *headers: str, query: str = ""
    ) -> bytes:
        """Sign and send; counts what came of it and remembers what it told."""
        signed = sign_request(self.keys[name], method, path, query, body, now=time.time(), tag=self.tag)
        lines = [*headers, *(f"{key}: {value}" for key, value in signed.items()), f"content-length: {len(body)}"]
        if not any(one.startswith("content-type") for one in headers):
            lines.append(f"content-type: {wire.MSGPACK}")
        target = f"{path}?{query}" if query else path
        head = "\r\n".join([f"{method} {target} HTTP/1.1", "host: fuzz", f"accept: {wire.MSGPACK}", *lines])
        try:
            status, _, answer = await line.ask(head.encode("latin-1") + b"\r\n\r\n" + body)
        except (OSError, EOFError, TimeoutError, ValueError):
            status, answer = 0, b""
        self.statuses[f"{status}"] += 1
        if status >= 500:
            self.broken.append(f"{status} {method} {target[:80]} {body[:80]!r}: {answer[:200]!r}")
        self._remember(answer, name)
        return answer if status == 200 else b""

    def _remember(self, answer: bytes, name: str) -> None:
        try:
            tree = msgspec.msgpack.decode(answer)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        self._note(tree)
        if isinstance(tree, dict) and tree.get("lease"):
            self.leases[name] = msgspec.msgpack.decode(tree["lease"]["payload"], type=m.Lease)

    def _note(self, tree: Any) -> None:
        if isinstance(tree, dict | list):
            for one in tree.values() if isinstance(tree, dict) else tree:
                self._note(one)
        elif isinstance(tree, str) and re.fullmatch(r"[0-9a-f]{64}|[a-z][0-9a-z]{12,16}", tree):
            self.seen["#" if len(tree) == 64 else tree[0]].append(tree)

    async def ask(self) -> None:
        """One request that is wrong in some way, or in none."""
        method, path, takes = self.random.choice(self.routes)
        role = next((role for part, role in SENDER.items() if f"/{part}" in path), "worker")
        name = role if role in self.keys else self._worker()
        name = self.random.choice(list(self.keys)) if self.random.random() < 0.15 else name
        if role == "worker" and "{lease}" in path and name not in self.leases:
            path, takes = "/v1/runs/{run}/leases", "LeaseRequest"
        body, kind = self._body(takes, name)
        if takes == "raw" and self.random.random() < 0.7:
            path = path.replace("{digest}", digest_of(body))
        path, headers = self._filled(path, name), [f"content-type: {kind}"]
        query = self.random.choice(QUERIES) if self.random.random() < 0.2 else ""
        if odd := self.random.random() < 0.1:
            headers = [self.random.choice(ODD_HEADERS), *headers][: self.random.randrange(1, 3)]
            path = path if self.random.random() < 0.5 else self._spoiled(path)
        line = Line(*self.address) if odd else self.lines.pop()
        if await self.say(line, name, method, path, body, *headers, query=query) and path.endswith("/submission"):
            self.leases.pop(name, None)
        if odd:
            line.close()
        else:
            self.lines.append(line)

    def _worker(self) -> str:
        return f"worker-{self.random.randrange(WORKERS)}"

    def _spoiled(self, path: str) -> str:
        """Odd, but still one word, or what follows would be another request."""
        text = self.chance.spoil(path.encode()).decode("latin-1")
        return "/" + "".join(one for one in text if one.isprintable() and one not in " ?#")

    def _known(self, letter: str, otherwise: str) -> str:
        return self.random.choice(self.seen[letter]) if self.seen[letter] else otherwise

    def _filled(self, path: str, name: str) -> str:
        lease = self.leases[name].lease if name in self.leases else self._known("l", "l1")
        values = {"run": "load", "lease": lease, "digest": self._known("#", HEX), "step": str(self.random.randrange(3))}
        values |= {"audit": self._known("a", "a1"), "id": self._known(self.random.choice("nlrgas"), "favicon.svg")}
        if self.random.random() < 0.08:
            values[self.random.choice(list(values))] = self.random.choice(
                ["", "%00", "..", "%2e%2e", "a" * 200, "é", "-1"]
            )
        for key, value in values.items():
            path = path.replace(f"{{{key}}}", value)
        return path

    def _body(self, takes: str, name: str) -> tuple[bytes, str]:
        if takes in ("", "raw"):
            return self.random.randbytes(self.random.choice((0, 0, 9, 300))), wire.MSGPACK
        tree = self._tree(takes, name)
        if self.random.random() < 0.3:
            return msgspec.msgpack.encode(tree), wire.MSGPACK
        return self.chance.encoded(tree)

    def _tree(self, takes: str, name: str) -> Any:
        """Something that the route could take from this node now."""
        if takes == "Submission" and name in self.leases:
            return self._submission(self.leases[name])
        if takes == "Signed":
            return self._sealed(name, verdict.KIND, self._local(example(m.Evidence)))
        tree = self._local(example(getattr(m, takes)))
        if takes == "Commit":
            manifest = self._local(example(m.Manifest))
            manifest["digest"] = target_digest(msgspec.convert(manifest["tensors"], list[m.Tensor]))
            tree["manifest"] = self._sealed(name, KIND, manifest)
        return tree | {key: 0 for key in ("wait_s", "linger_s") if key in tree}

    def _submission(self, lease: m.Lease) -> dict[str, Any]:
        samples = [sample for group in lease.groups for sample in group.samples]
        lengths = [self.random.randrange(1, lease.max_new_tokens + 1) for _ in samples]
        ids = [wire.pack_ids([5] * n if n == lease.max_new_tokens else [*[5] * (n - 1), 2]) for n in lengths]
        rollouts = [{"rollout": one.rollout, "ids": data} for one, data in zip(samples, ids, strict=True)]
        return {"rollouts": rollouts, "logp": [b"\0" * len(one) for one in ids], "partial": self.random.random() < 0.2}

    def _sealed(self, name: str, kind: str, tree: Any) -> dict[str, Any]:
        payload = msgspec.msgpack.encode(tree) if self.random.random() < 0.3 else self.chance.packed(tree)
        key = self.keys[name]
        signature = key.sign(b"farflung\0" + kind.encode() + b"\0" + payload)
        return {"kind": kind, "payload": payload, "public": key.public, "signature": signature}

    def _local(self, tree: Any) -> Any:
        """A tree whose made-up ids and digests are some that this coordinator knows."""
        if isinstance(tree, dict):
            return {key: "load" if key == "run" else self._local(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [self._local(one) for one in tree]
        if tree == HEX:
            return self._known("#", HEX)
        return self._known(self.random.choice("nlrga"), tree) if tree == "a1" else tree

    async def flood(self, count: int) -> None:
        """So many requests, some at a time."""
        self.lines = [Line(*self.address) for _ in range(AT_ONCE)]
        left = iter(range(count))

        async def one() -> None:
            for _ in left:
                await self.ask()

        await asyncio.gather(*(one() for _ in range(AT_ONCE)))
        for line in self.lines:
            line.close()
