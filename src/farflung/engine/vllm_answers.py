"""What a vLLM server says: its settings, the tokens that it sent with their log-probabilities, and how many it made."""

import re
from collections.abc import Sequence
from typing import Any

import httpx2
import numpy as np

from farflung.engine import sampling_check
from farflung.engine.arithmetic import BITS, Own
from farflung.engine.base import Replay, Request
from farflung.engine.sampling_check import Place
from farflung.protocol.errors import Unreachable

TIMEOUT_S = 600.0
"""For calls that load weights or ask for settings. A rollout takes as long as it takes: its lease has the deadline."""
COUNTED = re.compile(r"^vllm:generation_tokens_total(?:\{[^\n]*\})? (\d[\d.e+]*)", re.MULTILINE)
HOW = (
    "start it as docs/run.md says: VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --tokens-only "
    '--hf-overrides \'{"head_dtype": "float32"}\''
)


def only_choice(answer: dict[str, Any]) -> dict[str, Any]:
    return answer["choices"][0]


def places(answer: dict[str, Any]) -> list[Place]:
    """What a server tells of each token that it sent."""
    return [
        _place(one["token_id"], {top["token_id"]: top["logprob"] for top in (one, *one["top_logprobs"])})
        for one in only_choice(answer)["logprobs"]["content"]
    ]


def prompt_places(answer: dict[str, Any], start: int) -> list[Place]:
    """What a server tells of each token of a text from one on; it tells of the token itself first."""
    told = answer["prompt_logprobs"][start:]
    return [_place(int(next(iter(one))), {int(token): item["logprob"] for token, item in one.items()}) for one in told]


def _place(token: int, logp: dict[int, float]) -> Place:
    return Place(token, np.array(list(logp)), np.array(list(logp.values()), np.float64))


def replay_of(request: Request, places: Sequence[Place]) -> Replay:
    found_N5 = np.array([_compared(request, at, place) for at, place in enumerate(places)], np.float32)
    return Replay(*found_N5.reshape(-1, 5).T)


def _compared(request: Request, at: int, place: Place) -> tuple[float, float, float, float, float]:
    """Gap, margin, pick, lead and logp of one token among those told of."""
    divisor = request.temperature or 1.0
    policy_K = place.logp_K / divisor
    if divisor != 1:
        policy_K = policy_K - np.log(np.exp(policy_K).sum())  # up to the tokens that are not told of
    score_K = sampling_check.scores(request, at, place) if request.temperature else policy_K
    second, first = np.argsort(score_K)[-2:]
    sent = int(np.flatnonzero(place.ids_K == place.token)[0])
    pick = float(np.exp(policy_K[first])) if request.temperature else 1.0
    lead = policy_K[second] - policy_K[first]
    logp = policy_K[sent] if divisor == 1 else np.nan
    return score_K[first] - score_K[second], score_K[first] - score_K[sent], pick, lead, logp


def tokens_made(metrics: str) -> float:
    """Over all of its engines, since the server started."""
    return sum(float(value) for value in COUNTED.findall(metrics))


def server_settings(url: str) -> Any:
    """What a server says of its settings; nothing where it does not. Raises Unreachable."""
    try:
        answer = httpx2.get(f"{url.rstrip('/')}/server_info", params={"config_format": "json"}, timeout=TIMEOUT_S)
    except httpx2.TransportError as error:
        raise Unreachable(f"no vLLM answers at {url} ({error!r}); {HOW}") from error
    found = answer.json() if answer.status_code == 200 else None
    return found.get("vllm_config") if isinstance(found, dict) else None


def server_numerics(url: str) -> Own:
    """What a server says of its numerics; nothing of what it leaves out. Raises Unreachable."""
    found = server_settings(url)
    return Own("vllm", _at(found, "device_config", "device_type"), *_arithmetic(found))


def _arithmetic(found: Any) -> tuple[str, int]:
    """Arithmetic and bits of a weight by a server's settings; unknown for ways to quantise that have no name here."""
    dtype = _at(found, "model_config", "dtype").removeprefix("torch.")
    quantised, cached = _at(found, "model_config", "quantization"), _at(found, "cache_config", "cache_dtype")
    if quantised and not quantised.startswith("fp8"):
        return "", 0
    if quantised or cached.startswith("fp8"):
        return "fp8", BITS["fp8" if quantised else "bfloat16"]
    return (dtype, BITS[dtype]) if dtype in BITS else ("", 0)


def _at(found: Any, section: str, name: str) -> str:
    """One of a server's settings, empty where it says none."""
    value = _value(found, section, name)
    return value if isinstance(value, str) else ""


def number(found: Any, section: str, name: str) -> int:
    """The same of a number, 0 where it says none."""
    value = _value(found, section, name)
    return value if type(value) is int else 0


def _value(found: Any, section: str, name: str) -> Any:
    for key in (section, name):
        found = found.get(key) if isinstance(found, dict) else None
    return found
