"""An engine that samples right is never told otherwise, whatever its model; one that leaves tokens out is told."""

import numpy as np
import pytest

pytest.importorskip("torch")

from farflung.engine.base import Request
from farflung.engine.noise import bits_numpy, gumbel_numpy
from farflung.engine.sampling_check import TOP, Forced, Place, fault, forced, stale_prefixes, texts, withheld


class Server:
    """Logits drawn for each context; the noise of the run, and perhaps only some of the tokens to choose from."""

    def __init__(self, vocab: int, spread: float, seed: int, most: int = 0) -> None:
        self.vocab, self.spread, self.seed, self.most = vocab, spread, seed, most

    def logits(self, ids: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([self.seed, *ids])
        return rng.normal(0, self.spread, self.vocab).astype(np.float32)

    def place(self, ids: tuple[int, ...], token: int) -> Place:
        logits = self.logits(ids).astype(np.float64)
        logp = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        ids_K = np.unique([token, *np.argsort(-logp)[: TOP - 1]])
        return Place(token, ids_K, np.round(logp[ids_K], 6))

    def send(self, request: Request) -> list[Place]:
        said: list[Place] = []
        ids = request.prompt_ids
        for at in range(request.max_new_tokens):
            logits = self.logits(ids)
            scores = logits / request.temperature
            scores = scores + gumbel_numpy(bits_numpy([request.seed], request.first_position + at, self.vocab))[0]
            if self.most:
                scores[np.argsort(-logits)[self.most :]] = -np.inf
            said.append(self.place(ids, int(scores.argmax())))
            ids = (*ids, said[-1].token)
        return said


def told(server: Server) -> str:
    asked = texts(server.vocab, is_first=True)
    return fault([(one, server.send(one)) for one in asked]) or unlikely(server)


def unlikely(server: Server) -> str:
    asked = forced(server.vocab)
    sent = [server.send(one.request)[0].token for one in asked]
    read = [server.place(one.request.prompt_ids, one.token) for one in asked]
    return withheld(asked, sent, read, server.vocab)


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 4.0, 10.0])
@pytest.mark.parametrize("vocab", [32, 1000, 20_000])
def test_a_right_engine_is_never_told_otherwise(vocab: int, spread: float) -> None:
    for seed in range(3):
        assert told(Server(vocab, spread, seed)) == ""


@pytest.mark.parametrize(("vocab", "most"), [(1000, 5), (1000, 50), (20_000, 100), (20_000, 2000)])
def test_an_engine_that_leaves_tokens_out_is_told(vocab: int, most: int) -> None:
    assert "likeliest tokens only" in told(Server(vocab, 2.0, 0, most))


def test_nothing_is_said_where_the_noise_forces_no_token() -> None:
    """A policy that is sure of itself sends none of the unlikely tokens, and that is right."""
    assert unlikely(Server(1000, 30.0, 0, most=50)) == ""


def test_forced_tokens_have_more_noise_than_chance_gives_one() -> None:
    for one in forced(49_152):
        assert isinstance(one, Forced)
        noise = gumbel_numpy(bits_numpy([one.request.seed], one.request.first_position, 49_152))[0]
        assert noise[one.token] > 10


def test_a_prefix_of_before_shows_beyond_rounding() -> None:
    place = Place(3, np.array([1, 3, 5]), np.array([-1.0, -2.0, -0.7]))
    close, far = (place._replace(logp_K=place.logp_K + change) for change in (0.004, 0.3))
    assert not stale_prefixes([place], [close], [place])
    assert "prefixes" in stale_prefixes([place], [far], [close])
    assert not stale_prefixes([place], [far], [place._replace(logp_K=place.logp_K - 0.2)]), (
        "where rounding is as wide, none can tell"
    )
