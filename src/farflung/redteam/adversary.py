"""The adversary: a real worker whose engine and messages an attack may bend, and which keeps honest books.

For runs of one's own only. Beside its key each adversary writes cheats.jsonl, a line a submission: what it sent, what
the seeds would have given, the CPU-seconds that its own way took, and what the coordinator answered.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch

from farflung.engine.arithmetic import Own
from farflung.engine.base import Completion, Engine, Request
from farflung.engine.of_node import Place
from farflung.protocol import wire
from farflung.protocol.errors import Ejected, FarflungError, LeaseGone, Unreachable
from farflung.protocol.messages import Lease, Submission
from farflung.protocol.stops import Stops
from farflung.rollouts.lanes import Lanes
from farflung.rollouts.submit import generate, submit
from farflung.trust.evidence import Profile
from farflung.trust.record import TrustSettings
from farflung.worker import Worker

Aim = Literal["reward", "length", "pay", "poison"]
"""The aim of an attack, and so the measure of its gain: the shift of mean reward or of tokens a rollout against what
the seeds give on the same prompts; tokens paid and kept per CPU-second, where it cheated, relative to the honest;
poisoned tokens trained."""
Made = list[Completion | None]
Stop = Callable[[], bool] | None
"""Asked now and then whether to leave off."""
LEDGER = "cheats.jsonl"
TRIES = 3
"""Tries of an adversary that is turned away at the door."""


class Attack:
    """Honest in every way; each adversary of the gallery changes one thing."""

    aim: ClassVar[Aim] = "reward"
    is_at_the_door: ClassVar[bool] = False
    """Whether it is about what is sent rather than what is generated; it gives up when turned away often enough."""
    truth: Engine
    """The engine with the leased weights, which also answers for possession."""
    trust: TrustSettings
    judged_by: Profile
    """The run's own numerics profile."""
    declares: str = ""
    """Arithmetic whose numerics profile it is judged by, whatever it does; empty for one that fits."""

    def load(self, tensors: Sequence[tuple[str, Any]]) -> None:
        """Look at the weights that `truth` holds from now on."""

    def generate(self, requests: Sequence[Request], should_stop: Stop) -> Made:
        """The completions to send; here those that the seeds give."""
        return self.truth.generate(requests, should_stop)

    async def wants(self, worker: Worker, lease: Lease) -> bool:
        """Whether to work on this lease or hand it back."""
        return True

    def alter(self, lease: Lease, submission: Submission) -> Submission:
        """Change what is about to be sent."""
        return submission

    async def send(self, worker: Worker, lease: Lease, submission: Submission) -> None:
        """Hand in. Raises what the coordinator answers."""
        await submit(worker.session, lease, submission)


class Cheating:
    """An engine that says what the attack wants, and for all else is the true one, possession of weights included."""

    def __init__(self, truth: Engine, attack: Attack) -> None:
        self.truth, self.attack = truth, attack
        attack.truth = truth

    def __getattr__(self, name: str) -> Any:
        return getattr(self.truth, name)

    def load(self, tensors: Iterable[tuple[str, Any]]) -> None:
        """Load the true weights and show them to the attack."""
        kept = [(name, tensor.clone()) for name, tensor in tensors]
        self.truth.load(kept)
        self.attack.load(kept)

    def generate(self, requests: Sequence[Request], should_stop: Stop = None) -> Made:
        """Whatever the attack says."""
        return self.attack.generate(requests, should_stop)


class Adversary(Worker):
    """A worker that runs an attack."""

    def __init__(
        self, *arguments: Any, attack: Attack, trust: TrustSettings, judged_by: Profile, **options: Any
    ) -> None:
        super().__init__(*arguments, wrap=lambda engine: Cheating(engine, attack), **options)
        self.attack, self._tries, self._cpu_s = attack, 0, 0.0
        attack.trust, attack.judged_by = trust, judged_by
        self._seeded: dict[str, tuple[int, ...]] = {}

    async def _own(self) -> Own:
        own = await super()._own()
        return own._replace(arithmetic=self.attack.declares) if self.attack.declares else own

    def _engine(self, place: Place, config: bytes, dtype: torch.dtype, stops: Stops | None) -> Engine:
        return super()._engine(place, config, torch.float32 if self.attack.declares else dtype, stops)

    def _new_lanes(self) -> Lanes:
        lanes = super()._new_lanes()
        lanes.numbers = lanes.numbers[:1]  # the books are of a lease at a time
        return lanes

    async def _prepare(self) -> None:
        """No self-test: it would try the attack, and a lease loads the weights."""

    async def try_numerics(self, manifest: str) -> str:
        """The same."""
        return ""

    async def _work(self, lease: Lease) -> None:
        if not await self.attack.wants(self, lease):
            self._note(lease, [], "returned")
            await self._return(lease)
            return
        await super()._work(lease)

    def _generate(self, lease: Lease) -> list[tuple[str, Completion]]:
        before = time.thread_time()
        done = super()._generate(lease)
        self._cpu_s = time.thread_time() - before
        seeded = generate(self.attack.truth, lease, lambda: self.is_stopping)  # for the books: what was its duty
        self._seeded = {rollout: completion.ids for rollout, completion in seeded}
        return done

    async def send(self, lease: Lease, submission: Submission) -> None:
        """Alter, send, write down what came of it. Raises Ejected and whatever is no answer of the coordinator."""
        submission = self.attack.alter(lease, submission)
        answer = "taken"
        try:
            await self.attack.send(self, lease, submission)
        except FarflungError as error:
            answer = getattr(error, "code", type(error).__name__)
            if isinstance(error, Ejected | Unreachable) or not self.attack.is_at_the_door:
                raise
            self._give_up(error)
        finally:
            self._note(lease, list(submission.rollouts), answer)

    def _give_up(self, error: FarflungError) -> None:
        self._tries += 1
        self.is_stopping = self._tries >= TRIES
        raise LeaseGone(f"turned away: {error}") from error

    def _note(self, lease: Lease, rollouts: Sequence[Any], answer: str) -> None:
        """One line: what was sent beside what the seeds give."""
        texts = [
            (sent.rollout, wire.unpack_ids(sent.ids[: len(sent.ids) // 4 * 4]).tolist(), self._seeded[sent.rollout])
            for sent in rollouts
            if sent.rollout in self._seeded
        ]
        line = {"lease": lease.lease, "step": lease.step, "cpu_s": self._cpu_s, "answer": answer, "rollouts": texts}
        with (self.folder / LEDGER).open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._cpu_s = 0.0
