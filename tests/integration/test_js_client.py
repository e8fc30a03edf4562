"""The client in another language against a real coordinator: refusals are as docs/protocol.md says."""

import json
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.served import Served

from farflung.engine import noise

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "examples" / "js_client" / "client.mjs"
NODE = shutil.which("node")

REFUSALS = {
    "ends too early": "422 rejected",
    "never ends": "422 rejected",
    "goes on after its end": "422 rejected",
    "beyond the vocabulary": "422 rejected",
    "one rollout is missing": "422 rejected",
    "somebody else's rollout": "422 rejected",
    "somebody else's lease": "403 forbidden",
    "truncated, then signed": "400 malformed",
    "signed, then truncated": "401 bad-signature",
    "a wrong signature": "401 bad-signature",
    "signed long ago": "401 clock-skew",
    "a key nobody knows": "404 not-found",
    "a role nobody granted": "403 forbidden",
    "no possession of the weights": "422 wrong-weights",
    "the same request again": "401 replayed",
    "the lease went to others": "409 lease-gone",
}


@pytest.fixture
def url(make_house) -> Iterator[str]:
    """A coordinator on a socket whose trainer has published step 0, which a node must show that it holds."""
    if NODE is None:
        pytest.skip("the client in JavaScript needs `node` (20 or later) on the PATH")
    house = make_house()

    async def publish(house) -> None:
        batch = await house.claim_step(0)
        await house.commit(batch, probe=b"weights of step 0")

    served = Served(house)
    try:
        house.run(publish)
        yield served.url
    finally:
        served.close()


def test_a_client_in_javascript_is_refused_as_the_protocol_says(url: str) -> None:
    assert NODE is not None
    done = subprocess.run([NODE, str(CLIENT), url], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    got = dict(re.findall(r"^(.+?): (\d+ [a-z-]+): .+$", done.stdout, re.MULTILINE))
    assert got == REFUSALS


def test_the_noise_in_javascript_is_the_runs() -> None:
    if NODE is None:
        pytest.skip("the noise in JavaScript needs `node` (20 or later) on the PATH")
    rng = random.Random(0)
    places = [(rng.randrange(2**53), rng.randrange(2**17), rng.randrange(2**18)) for _ in range(2000)]
    script = f"""import {{ rowState, bits, gumbel }} from {json.dumps(str(CLIENT.with_name("noise.mjs")))}
    const hashes = {json.dumps(places)}.map(([seed, position, token]) => bits(rowState(seed, position), token))
    console.log(JSON.stringify([hashes, hashes.map(gumbel)]))"""
    done = subprocess.run(
        [NODE, "--input-type=module", "-e", script], capture_output=True, text=True, timeout=60, check=True
    )
    hashes, values = json.loads(done.stdout)
    expected = noise.bits_at(*zip(*places, strict=True))
    assert hashes == expected.tolist()
    assert values == pytest.approx(noise.gumbel_numpy(expected).tolist(), abs=3e-6)
