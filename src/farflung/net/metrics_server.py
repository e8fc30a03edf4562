"""Prometheus figures of a role that has no HTTP server of its own: a small one on this machine alone, if asked for."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from farflung.protocol.errors import ConfigError

if TYPE_CHECKING:
    from farflung.net.session import Session


class RoleFigures(Collector):
    """The figures that a role gives of itself in heartbeats, as Prometheus reads them."""

    def __init__(self, session: "Session", role: str) -> None:
        self.session, self.role = session, role

    def collect(self) -> Iterator[Metric]:
        """The figures as they are now."""
        from farflung.net.session import cpu_s

        figures, labels = self.session.stats, [self.session.run, self.role]
        gauges = (
            ("farflung_loaded_step", "Policy step whose weights are in memory, -1 for none.", figures.loaded_step),
            ("farflung_latest_step", "Latest policy step this node has heard of.", self.session.latest.step),
            ("farflung_sync_pause_seconds", "Seconds that the last swap of weights took.", figures.sync_pause_s),
            ("farflung_started_at_seconds", "When this process started, Unix time.", figures.started_at),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(name, text, labels=["run", "role"])
            gauge.add_metric(labels, value)
            yield gauge
        counters = (
            ("farflung_cpu_seconds", "CPU-seconds of this process and its children.", cpu_s()),
            ("farflung_work_cpu_seconds", "CPU-seconds of this role's own work.", figures.work_cpu_s),
            ("farflung_work_device_seconds", "Seconds of its accelerators, the same.", figures.work_device_s),
        )
        for name, text, value in counters:
            counter = CounterMetricFamily(name, text, labels=["run", "role"])
            counter.add_metric(labels, value)
            yield counter


def exposition(session: "Session", role: str) -> bytes:
    """The text that Prometheus scrapes."""
    registry = CollectorRegistry()
    registry.register(RoleFigures(session, role))
    return generate_latest(registry)


def expose(session: "Session", role: str, port: int) -> None:
    """Serve GET /metrics on 127.0.0.1 at `port`; 0 for no server. Raises ConfigError if the port is taken."""
    if not port:
        return
    registry = CollectorRegistry()
    registry.register(RoleFigures(session, role))
    try:
        start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise ConfigError(f"cannot serve metrics on 127.0.0.1:{port}: {error.strerror}; choose another port") from error
