"""A coordinator that speaks https by configuration, with a certificate of one's own."""

import asyncio
import datetime
import ipaddress
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from farflung.net.client import CA_VARIABLE, Client
from farflung.net.session import Index
from farflung.protocol import messages as m
from farflung.protocol.errors import ConfigError, Unreachable
from farflung.protocol.identity import Key

BASE = Path(__file__).parents[2] / "examples" / "base"
DAY = datetime.timedelta(days=1)
pytestmark = pytest.mark.swarm


def certify(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "farflung test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + DAY)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files = folder / "cert.pem", folder / "key.pem"
    files[0].write_bytes(certificate.public_bytes(pem))
    files[1].write_bytes(key.private_bytes(pem, *form))
    return files


def command(folder: Path, *flags: str) -> list[str]:
    """The coordinator's command line."""
    config = folder / "tls.toml"
    tree = f'[run]\nname = "tls"\ndir = "{folder}"\n[model]\npath = "{BASE}"\n'
    config.write_text(tree + "[env]\ntrain_tasks = 64\n[generate]\nmax_new_tokens = 32\n")
    return [sys.executable, "-m", "farflung", "coordinator", str(config), *flags]


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a coordinator, and its certificate."""
    cert, key = certify(tmp_path)
    flags = "--coordinator.tls_cert", str(cert), "--coordinator.tls_key", str(key)
    process = subprocess.Popen(command(tmp_path, *flags), stderr=subprocess.PIPE, text=True)
    url, until = tmp_path / "tls" / "coordinator.url", time.monotonic() + 60
    while not url.exists() or not url.read_text():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)
    yield url.read_text().strip(), cert
    process.terminate()
    process.communicate(timeout=30)


def test_nodes_speak_https_with_an_authority_that_they_were_told(secured, monkeypatch) -> None:
    url, cert = secured
    assert url.startswith("https://127.0.0.1:")

    async def register() -> m.Welcome:
        client = Client(url, Key.make(), patience_s=0.0)
        try:
            client.tag = (await client.get("/v1", Index)).coordinator
            return await client.post("/v1/nodes", m.Register(version=m.VERSION), m.Welcome)
        finally:
            await client.close()

    with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
        asyncio.run(register())
    monkeypatch.setenv(CA_VARIABLE, str(cert))
    assert asyncio.run(register()).role == "worker"
    status = [sys.executable, "-m", "farflung", "status", url]
    assert "tls" in subprocess.run(status, capture_output=True, text=True, check=True, timeout=60).stdout
    monkeypatch.setenv(CA_VARIABLE, str(BASE / "config.json"))
    with pytest.raises(ConfigError, match="holds no certificates in PEM"):
        asyncio.run(register())


def test_a_certificate_without_its_key_is_refused(tmp_path: Path) -> None:
    cert, _ = certify(tmp_path)
    for flags, why in (
        ([], "go together"),
        (["--coordinator.tls_key", str(cert)], "are no certificate with its key"),
    ):
        asked = command(tmp_path, "--coordinator.tls_cert", str(cert), *flags)
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, why in done.stderr) == (2, True), done.stderr
