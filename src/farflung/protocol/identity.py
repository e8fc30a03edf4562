"""Identity: Ed25519 keys, node ids, signed requests (RFC 9421) and signed documents.

A node is a key. Its id is derived from the public key, so no authority hands out identities and none can be taken.
"""

import base64
import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import msgspec
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from farflung.protocol.errors import BadSignature, ClockSkew, ConfigError

T = TypeVar("T")
KEY_BYTES = 32
CLOCK_SKEW_S = 60
COMPONENTS = ("@method", "@path", "@query", "content-digest")


@lru_cache(maxsize=65_536)
def node_id(public: bytes) -> str:
    """The id of a key: `n` and 80 bits of SHA-256 over the 32 raw bytes, in lower-case base32."""
    return "n" + base64.b32encode(hashlib.sha256(public).digest()[:10]).decode().lower()


ADJECTIVES = [
    "amber",
    "ample",
    "azure",
    "bold",
    "brave",
    "brisk",
    "calm",
    "cheery",
    "clever",
    "coral",
    "crisp",
    "curly",
    "dapper",
    "eager",
    "early",
    "fancy",
    "fleet",
    "fluffy",
    "gentle",
    "glad",
    "golden",
    "humble",
    "ivory",
    "jolly",
    "keen",
    "kind",
    "lively",
    "lucky",
    "mellow",
    "merry",
    "misty",
    "modest",
    "nimble",
    "noble",
    "patient",
    "plucky",
    "polite",
    "proud",
    "quick",
    "quiet",
    "rapid",
    "rosy",
    "ruby",
    "rustic",
    "sandy",
    "shiny",
    "silver",
    "sleek",
    "snowy",
    "steady",
    "sunny",
    "swift",
    "tidy",
    "tiny",
    "vivid",
    "warm",
    "witty",
]
ANIMALS = [
    "badger",
    "beaver",
    "bison",
    "bobcat",
    "camel",
    "cheetah",
    "condor",
    "cougar",
    "coyote",
    "crane",
    "cricket",
    "dingo",
    "dolphin",
    "eagle",
    "egret",
    "falcon",
    "ferret",
    "finch",
    "fox",
    "gazelle",
    "gecko",
    "gibbon",
    "heron",
    "hornet",
    "ibex",
    "ibis",
    "iguana",
    "jackal",
    "jaguar",
    "kestrel",
    "koala",
    "lemur",
    "leopard",
    "lynx",
    "magpie",
    "marmot",
    "marten",
    "mole",
    "moose",
    "newt",
    "ocelot",
    "octopus",
    "orca",
    "osprey",
    "otter",
    "owl",
    "panda",
    "parrot",
    "pelican",
    "penguin",
    "puffin",
    "puma",
    "quail",
    "rabbit",
    "raven",
    "robin",
    "salmon",
    "seal",
    "shrew",
    "sparrow",
    "stork",
    "swan",
    "tapir",
    "tern",
    "toucan",
    "turtle",
    "walrus",
    "weasel",
    "wombat",
    "wren",
    "zebra",
]


def readable_name(node: str) -> str:
    """A name for a node that gave none: an adjective and an animal, the same for the same id. Not unique."""
    draw = int.from_bytes(hashlib.sha256(node.encode()).digest()[:8])
    return f"{ADJECTIVES[draw % len(ADJECTIVES)]}-{ANIMALS[draw // len(ADJECTIVES) % len(ANIMALS)]}"


class Key:
    """A private key that can sign."""

    def __init__(self, seed: bytes) -> None:
        self._private = SigningKey(seed)
        self.seed = seed
        self.public = bytes(self._private.verify_key)
        self.id = node_id(self.public)

    @classmethod
    def make(cls) -> "Key":
        """A fresh random key."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def load_or_make(cls, path: Path) -> "Key":
        """Read the key at `path`, or make one there, readable by its owner alone."""
        if not path.exists():
            cls.make()._write(path)
        return cls._read(path)

    def _write(self, path: Path) -> None:
        """Put the key at `path`, whole or not at all; one that another process put there meanwhile stays."""
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(self.seed.hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            try:
                os.link(partial, path)
            except PermissionError:  # a file system without links, such as a memory card's
                partial.rename(path)
        partial.unlink(missing_ok=True)

    @classmethod
    def _read(cls, path: Path) -> "Key":
        text = path.read_bytes().decode("ascii", "replace").strip()
        if not re.fullmatch(r"[0-9a-f]{64}", text):
            raise ConfigError(f"{path} is not a key file (64 hex digits); move it away and a new key will be made")
        return cls(bytes.fromhex(text))

    def sign(self, message: bytes) -> bytes:
        """A 64-byte Ed25519 signature."""
        return self._private.sign(message).signature


def verify(public: bytes, signature: bytes, message: bytes) -> bool:
    """Whether `signature` over `message` is by the holder of `public`; malformed keys are simply not."""
    try:
        VerifyKey(public).verify(message, signature)
    except (BadSignatureError, ValueError):
        return False
    return True


# --- signed requests -------------------------------------------------------------------------------------------------


def content_digest(body: bytes) -> str:
    """The Content-Digest header (RFC 9530) of a body."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def _parameters(created: int, nonce: str, public: bytes, tag: str) -> str:
    names = " ".join(f'"{name}"' for name in COMPONENTS)
    key = base64.urlsafe_b64encode(public).decode().rstrip("=")
    return f'({names});created={created};nonce="{nonce}";alg="ed25519";keyid="{key}";tag="{tag}"'


def signature_base(method: str, path: str, query: str, digest: str, parameters: str) -> bytes:
    """The bytes that are signed (RFC 9421 §2.5) for our one fixed list of components."""
    lines = (
        f'"@method": {method}',
        f'"@path": {path}',
        f'"@query": ?{query}',
        f'"content-digest": {digest}',
        f'"@signature-params": {parameters}',
    )
    return "\n".join(lines).encode()


def sign_request(key: Key, method: str, path: str, query: str, body: bytes, *, now: float, tag: str) -> dict[str, str]:
    """The headers that sign one request. `tag` names the coordinator that is meant, so no other can replay it."""
    digest = content_digest(body)
    parameters = _parameters(int(now), secrets.token_urlsafe(16), key.public, tag)
    signature = key.sign(signature_base(method, path, query, digest, parameters))
    return {
        "content-digest": digest,
        "signature-input": f"sig1={parameters}",
        "signature": f"sig1=:{base64.b64encode(signature).decode()}:",
    }


_INPUT = re.compile(
    r'sig1=(?P<parameters>\("@method" "@path" "@query" "content-digest"\);created=(?P<created>\d{1,12});'
    r'nonce="(?P<nonce>[\w-]{16,64})";alg="ed25519";keyid="(?P<key>[\w-]{43})";tag="(?P<tag>[\w.:-]{1,80})")',
    re.ASCII,
)
_DIGEST = re.compile(r"sha-256=:[A-Za-z0-9+/]{43}=:")
_SIGNATURE = re.compile(r"sig1=:(?P<value>[A-Za-z0-9+/]{86}==):")


class Signer(msgspec.Struct, frozen=True):
    """The signer of a request, once it verified."""

    node: str
    public: bytes
    nonce: str


def verify_request(headers: Mapping[str, str], method: str, path: str, query: str, *, now: float, tag: str) -> Signer:
    """Check a signed request by its headers alone and say who sent it, before a byte of its body is read.

    Raises BadSignature or ClockSkew. Whether the nonce is fresh is the caller's to remember, and the body has to be
    held against the signed Content-Digest (`check_digest`) once it is here.
    """
    given = _INPUT.fullmatch(headers.get("signature-input", ""))
    signature = _SIGNATURE.fullmatch(headers.get("signature", ""))
    if given is None or signature is None:
        raise BadSignature("the Signature-Input or Signature header is missing or not in the form of docs/protocol.md")
    if given["tag"] != tag:
        raise BadSignature(f"the request is signed for coordinator {given['tag']!r}, this is {tag!r}")
    skew_s = int(given["created"]) - now
    if abs(skew_s) > CLOCK_SKEW_S:
        raise ClockSkew(f"the request was signed {skew_s:+.0f} s from now, {CLOCK_SKEW_S} s are allowed; set the clock")
    digest = headers.get("content-digest", "")
    if not _DIGEST.fullmatch(digest):
        raise BadSignature("the Content-Digest header is missing or not in the form sha-256=:base64:")
    public = base64.urlsafe_b64decode(given["key"] + "=")
    base = signature_base(method, path, query, digest, given["parameters"])
    if not verify(public, base64.b64decode(signature["value"]), base):
        raise BadSignature
    return Signer(node_id(public), public, given["nonce"])


def check_digest(headers: Mapping[str, str], body: bytes) -> None:
    """Raises BadSignature unless the body is the one whose digest was signed."""
    digest = content_digest(body)
    if headers.get("content-digest") != digest:
        raise BadSignature(f"the Content-Digest does not match the body, which hashes to {digest}")


# --- signed documents ------------------------------------------------------------------------------------------------


class Signed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A document and its signature. `kind` is signed too, so one document cannot pass for another."""

    kind: str
    payload: bytes
    public: bytes
    signature: bytes


def seal(key: Key, kind: str, document: msgspec.Struct) -> Signed:
    """Sign a document."""
    payload = msgspec.msgpack.encode(document)
    return Signed(kind, payload, key.public, key.sign(_sealed_bytes(kind, payload)))


Trusted = bytes | Collection[bytes]
"""A public key, or several of which each will do."""


def unseal(signed: Signed, kind: str, type: type[T], *, public: Trusted | None = None) -> T:
    """Open a signed document, by `public` where not every key will do. Raises BadSignature."""
    if signed.kind != kind:
        raise BadSignature(f"this is a signed {signed.kind!r}, not a {kind!r}")
    trusted = [public] if isinstance(public, bytes) else public
    if trusted is not None and signed.public not in trusted:
        those = " or ".join(node_id(one) for one in trusted) or "anybody who may"  # type: ignore[arg-type]
        raise BadSignature(f"the {kind} is signed by {node_id(signed.public)}, not by {those}")
    if not verify(signed.public, signed.signature, _sealed_bytes(kind, signed.payload)):
        raise BadSignature(f"the signature of this {kind} does not verify")
    try:
        return msgspec.msgpack.decode(signed.payload, type=type)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadSignature(f"the signed {kind} cannot be read: {error}") from error


def _sealed_bytes(kind: str, payload: bytes) -> bytes:
    return b"farflung\0" + kind.encode() + b"\0" + payload
