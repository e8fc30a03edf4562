"""GET /metrics of the coordinator: the run's status as Prometheus reads it."""

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from farflung.protocol.messages import Status


class RunFigures(Collector):
    """One status, as families of metrics."""

    def __init__(self, status: Status) -> None:
        self.status = status

    def collect(self) -> Iterator[Metric]:
        """The figures of this status."""
        status = self.status
        last = status.steps[-1] if status.steps else None
        yield _gauge("farflung_step", "Latest published policy step.", {(): status.latest.step}, ())
        yield _gauge("farflung_steps_total", "Steps the run is to take.", {(): status.steps_total}, ())
        yield _gauge(
            "farflung_reward", "Mean reward of the last step's groups.", {(): last.reward if last else 0.0}, ()
        )
        evals = {(str(view.step),): view.score for view in status.evals}
        yield _gauge("farflung_eval_score", "Held-out score by policy step.", evals, ("step",))
        passed = {(str(view.step),): view.pass_k for view in status.evals if view.pass_k is not None}
        yield _gauge("farflung_eval_pass_k", "Held-out pass@k by policy step; k is eval.k.", passed, ("step",))
        online = Counter((node.role, node.status) for node in status.nodes if node.is_online)
        yield _gauge("farflung_nodes_online", "Nodes heard of lately.", online, ("role", "status"))
        yield _gauge("farflung_rollouts", "Rollouts by status.", _by(status.rollouts), ("status",))
        yield _gauge("farflung_groups", "Groups by status.", _by(status.groups), ("status",))
        yield _gauge("farflung_audits", "Audits by status.", _by(status.audits), ("status",))
        yield _gauge("farflung_leases_open", "Leases being worked on.", {(): status.leases_open}, ())
        yield _counter("farflung_leases_reissued", "Leases whose work went to others.", status.leases_reissued)
        yield _counter(
            "farflung_accepted_rollouts", "Rollouts accepted from nodes that are not ejected.", status.accepted
        )
        yield _counter(
            "farflung_accepted_tokens", "Tokens accepted from nodes that are not ejected.", status.accepted_tokens
        )
        ejections = sum(verdict.outcome == "eject" for verdict in status.verdicts)
        yield _counter("farflung_ejections", "Nodes ejected by verdict.", ejections)
        for name, value in (last.metrics if last else {}).items():
            yield _gauge(f"farflung_trainer_{name}", "Figure of the last training step.", {(): value}, ())


def exposition(status: Status) -> bytes:
    """The text that Prometheus scrapes."""
    registry = CollectorRegistry()
    registry.register(RunFigures(status))
    return generate_latest(registry)


def _by(counts: Mapping[str, int]) -> dict[tuple[str, ...], int]:
    return {(status,): count for status, count in counts.items()}


def _gauge(name: str, text: str, values: Mapping[tuple[str, ...], float], labels: tuple[str, ...]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)
