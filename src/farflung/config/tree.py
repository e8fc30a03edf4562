"""The whole tree of settings, and the values that follow from several of them together."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit, urlunsplit

from pydantic import PrivateAttr, model_validator

from farflung.config.coordination import CoordinatorSection, LeaseSection, TrustSection
from farflung.config.embedded import ChaosSection, PricesSection, SinksSection, SwarmSection
from farflung.config.idle import IdleSection
from farflung.config.learning import EnvSection, EvalSection, GenerateSection, LearnSection, ModelSection, RunSection
from farflung.config.machines import RelaySection, ScorerSection, ValidatorSection, WorkerSection
from farflung.config.section import Section

WAVES = 2
"""A lease may hold twice as many rollouts as a node generates at once."""


class Config(Section):
    """Everything that can be set."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    env: EnvSection = EnvSection()
    generate: GenerateSection = GenerateSection()
    learn: LearnSection = LearnSection()
    lease: LeaseSection = LeaseSection()
    trust: TrustSection = TrustSection()
    eval: EvalSection = EvalSection()
    coordinator: CoordinatorSection = CoordinatorSection()
    worker: WorkerSection = WorkerSection()
    idle: IdleSection = IdleSection()
    validator: ValidatorSection = ValidatorSection()
    relay: RelaySection = RelaySection()
    scorer: ScorerSection = ScorerSection()
    swarm: SwarmSection = SwarmSection()
    chaos: ChaosSection = ChaosSection()
    prices: PricesSection = PricesSection()
    sinks: SinksSection = SinksSection()
    _place: tuple[Path, str, Path] | None = PrivateAttr(default=None)
    """`run.dir`, `run.name` and the folder where the run with these two is in fact, once it was moved."""

    @model_validator(mode="after")
    def _lengths_within_limit(self) -> Self:
        if self.env.lengths and max(self.env.lengths) > self.generate.max_new_tokens:
            raise ValueError(
                f"env.lengths {self.env.lengths} go beyond generate.max_new_tokens = {self.generate.max_new_tokens}"
            )
        return self

    @property
    def deadline_s(self) -> float:
        """Seconds that a lease may last: as long as the slowest node takes for the longest rollouts, in two waves."""
        return max(self.lease.lease_s, WAVES * self.generate.max_new_tokens / self.lease.slowest_tokens_per_s)

    def lockstep_groups(self, policy: int) -> int:
        """Groups that are generated with the policy of a step, in lockstep: the first ones train on the base model."""
        return self.learn.groups * (self.learn.max_staleness + 1 if policy == 0 else 1)

    @property
    def folder(self) -> Path:
        """Where the run keeps its files."""
        if self._place and self._place[:2] == (self.run.dir, self.run.name):
            return self._place[2]
        return self.run.dir / self.run.name

    def at(self, folder: Path) -> "Config":
        """The same run in the folder where it is by now, wherever it was founded and whatever it was called."""
        model = self.model.model_copy(
            update={
                "profile": _moved(self.model.profile, folder),
                "profiles": tuple(_moved(name, folder) for name in self.model.profiles),
            }
        )
        config = self.model_copy(update={"model": model})
        config._place = (self.run.dir, self.run.name, folder)
        return config

    @property
    def scheme(self) -> Literal["http", "https"]:
        """How the coordinator is spoken to where no proxy is in front."""
        return "https" if self.coordinator.tls_cert else "http"

    @property
    def database_url(self) -> str:
        """The database, embedded by default."""
        return self.coordinator.database or f"sqlite:///{self.folder.resolve() / 'farflung.db'}"

    @property
    def blobs_url(self) -> str:
        """The blob store, embedded by default."""
        return self.coordinator.blobs or f"file://{self.folder.resolve() / 'blobs'}"

    @property
    def submissions_url(self) -> str:
        """Where submissions are kept, apart from what anybody may fetch by digest."""
        parts = urlsplit(self.blobs_url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/submissions"))

    def eval_steps(self, latest: int) -> list[int]:
        """The policy steps up to `latest` that are to be evaluated."""
        every, last = self.eval.every, self.run.steps
        due = {0, last} | (set(range(0, last, every)) if every else set())
        return sorted(step for step in due if step <= latest) if self.eval.tasks else []


def _moved(name: str, folder: Path) -> str:
    """A profile that was made for the run whose folder was elsewhere then; any other stays as it is."""
    here = folder / "profiles" / Path(name).name
    return str(here.resolve()) if name.endswith(".json") and not Path(name).exists() and here.exists() else name


def fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its pydantic field."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield prefix + name, field
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field
