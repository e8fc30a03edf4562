"""A learner on all ranks: rank 0 names the next work, the others do the same with their shards.

Ranks exchange msgpack of the structs below, never a pickle: rank 0 made it of bytes that strangers sent.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load, save

from farflung.learner import checkpoint
from farflung.learner.optimise import Learner, StepMetrics
from farflung.learner.pack import Rollout, lay, pack
from farflung.learner.ranks import Ranks, broadcast
from farflung.numerics.merge import Factors
from farflung.protocol.probe import Slice

Logp = dict[int, torch.Tensor]
Named = tuple[str, torch.Tensor]


class Command(msgspec.Struct, frozen=True, tag=True):
    """The next work of all ranks; this one does nothing, and shows that rank 0 is alive."""


class Begin(Command, frozen=True):
    """Make the learner, with the base model."""


class Resume(Command, frozen=True):
    """Load a checkpoint."""

    path: str


class Train(Command, frozen=True):
    """Take a step."""

    rollouts: tuple[Rollout, ...]
    logp: bytes
    """Of rollouts under the weights that they were leased at, as safetensors by index."""
    present: int
    """The policy before the step; rollouts of earlier ones are stale."""


class Gather(Command, frozen=True):
    """Begin to put masters together, of all names if none is given, or the base that adapters are added to."""

    names: tuple[str, ...]
    is_base: bool = False


class Next(Command, frozen=True):
    """Put the next of those together."""


class Adapters(Command, frozen=True):
    """Put adapters together."""


class Save(Command, frozen=True):
    """Write a checkpoint."""

    step: int


class Beside(Command, frozen=True):
    """Work of what the ranks hold beside the learner, in its own words."""

    data: bytes


class End(Command, frozen=True):
    """Leave."""


Commands = Command | Begin | Resume | Train | Gather | Next | Adapters | Save | Beside | End


class DistributedLearner:
    """The learner of one process; on rank 0 every call is done by all. `make` builds it, the same on each."""

    def __init__(
        self, make: Callable[[], Learner], folder: Path, *, microbatch_tokens: int, keep: int, ranks: Ranks
    ) -> None:
        self._make, self._folder, self._tokens, self._keep, self.ranks = make, folder, microbatch_tokens, keep, ranks
        self.learner: Learner
        self._gathering: Iterator[Named] = iter(())

    # --- what rank 0 calls -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The base model."""
        self._do(Begin())

    def resume(self, path: Path) -> int:
        """A checkpoint; gives its step."""
        return int(self._do(Resume(str(path))) or 0)

    def train(self, rollouts: Sequence[Rollout], logp: Logp, present: int) -> StepMetrics:
        """One step after policy `present`, on rollouts whose log-probabilities were perhaps found before."""
        kept = save({str(index): values.contiguous() for index, values in logp.items()})
        found = self._do(Train(tuple(rollouts), kept, present))
        assert isinstance(found, StepMetrics), "a step has metrics"
        return found

    def save(self, step: int) -> None:
        """A checkpoint of this step, among the newest few."""
        self._do(Save(step))

    def masters(self, names: Collection[str] = ()) -> Iterator[Named]:
        """(name, tensor) of the float32 masters, whole; of the learner ask nothing else until all are taken."""
        return self._gathered(Gather(tuple(names)))

    def tensors(self) -> Iterator[Named]:
        """The published weights: the masters in bfloat16."""
        return ((name, self.learner.policy.rounded(tensor)) for name, tensor in self.masters())

    def base(self) -> Iterator[Named]:
        """The published weights without their adapters; of the learner ask nothing else until all are taken."""
        return self._gathered(Gather((), is_base=True))

    def factors(self) -> list[Factors]:
        """The adapters as they are published. Raises WeightsError where one is not finite."""
        self._tell(Adapters())
        return [replace(one, A=one.A.cpu(), B=one.B.cpu()) for one in self.learner.policy.factors()]

    def parts(self, slices: Sequence[Slice]) -> list[torch.Tensor]:
        """Slices of what is published, flat, in their order."""
        policy, masters = self.learner.policy, dict(self.masters(sorted({part.name for part in slices})))
        return [policy.rounded(masters[name].flatten()[start:stop], start) for name, start, stop in slices]

    def tell_beside(self, data: bytes) -> None:
        """Tell the others what to do with what they hold beside the learner."""
        self._tell(Beside(data))

    def wait(self) -> None:
        """Nothing to do yet."""
        self._tell(Command())

    def end(self) -> None:
        """Send the others home."""
        self._tell(End())

    # --- what every rank does ----------------------------------------------------------------------------------------

    def follow(self, beside: Callable[[bytes], None]) -> None:
        """Do what rank 0 says, to the end; `beside` does what is not the learner's work."""
        while not isinstance(command := self._hear(), End):
            if isinstance(command, Beside):
                beside(command.data)
            else:
                self._execute(command)

    def _gathered(self, command: Gather) -> Iterator[Named]:
        """Each tensor is told of, for the ranks have other work beside the learner's."""
        self._do(command)
        while True:
            self._tell(Next())
            if (named := next(self._gathering, None)) is None:
                return
            yield named

    def _do(self, command: Commands) -> StepMetrics | int | None:
        self._tell(command)
        return self._execute(command)

    def _execute(self, command: Commands) -> StepMetrics | int | None:
        match command:
            case Begin():
                self.learner = self._make()
            case Resume(path=path):
                return checkpoint.load(self.learner, Path(path))
            case Train(rollouts=rollouts, logp=logp, present=present):
                return self._step(rollouts, {int(name): values for name, values in load(logp).items()}, present)
            case Save(step=step):
                checkpoint.save(self.learner, step, self._folder, keep=self._keep)
            case Gather(names=names, is_base=is_base):
                policy = self.learner.policy
                self._gathering = policy.base() if is_base else policy.masters(names)
            case Next():
                next(self._gathering, None)
            case Adapters():
                self.learner.policy.factors()
            case _:
                return None
        return None

    def _step(self, rollouts: Sequence[Rollout], logp: Logp, present: int) -> StepMetrics:
        updates, policy = self.learner.settings.minibatches, self.learner.policy
        tokens = self._tokens if policy.can_pad or self.ranks.is_alone else 1  # a row each: equally many passes
        packed = pack(rollouts, tokens, is_shared=policy.can_share, at_least=updates)
        stale = {index: values for index, values in logp.items() if rollouts[index].step < present}
        fresh = {index: values for index, values in logp.items() if index not in stale}
        return self.learner.step(packed, lay(packed, stale), lay(packed, fresh))

    def _tell(self, command: Commands) -> None:
        if not self.ranks.is_alone:
            broadcast(msgspec.msgpack.encode(command), self.ranks)

    def _hear(self) -> Commands:
        return msgspec.msgpack.decode(broadcast(b"", self.ranks), type=Commands)
