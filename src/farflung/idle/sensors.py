"""All sources together: the facts of this moment, and what no source tells on this machine."""

import logging
import time

from farflung.config.idle import IdleSection
from farflung.idle.decide import Facts
from farflung.idle.sources import Missing, Source
from farflung.idle.sources.others import CpuOfOthers, GpuOfOthers, own_root, running
from farflung.idle.sources.power import on_battery, temperature_c
from farflung.idle.sources.system_bus import Logind, MeteredNetwork, SystemBus
from farflung.idle.sources.user import UserIdle

log = logging.getLogger(__name__)
NAMES = {
    "user_idle_s": "keys and mouse",
    "cpu_percent": "load of others",
    "gpu_percent": "GPU load of others",
    "is_on_battery": "battery",
    "temperature_c": "temperature",
    "gpu_temperature_c": "GPU temperature",
    "is_metered": "metered network",
}


class Sensors:
    """What this machine can tell. A node whose server computes elsewhere passes over load, most of which is its own."""

    def __init__(self, *, is_elsewhere: bool = False) -> None:
        root, self._bus = own_root(), SystemBus()
        gpu, self._user = GpuOfOthers(root), UserIdle(Logind(self._bus))
        self._sources: dict[str, Source] = {
            "user_idle_s": self._user,
            "cpu_percent": CpuOfOthers(root),
            "gpu_percent": gpu,
            "is_on_battery": on_battery,
            "temperature_c": temperature_c,
            "gpu_temperature_c": gpu.temperature_c,
            "is_metered": MeteredNetwork(self._bus),
        }
        if is_elsewhere:
            del self._sources["cpu_percent"], self._sources["gpu_percent"]
        self._told: set[str] = set()
        self.missing: dict[str, Missing] = {}
        """By name, the sources that told nothing at the last look."""

    def read(self, rules: IdleSection) -> Facts:
        """The facts of this moment."""
        told = {name: self._reading(name) for name in self._sources} if rules.when_idle else {}
        celsius = [found for name in ("temperature_c", "gpu_temperature_c") if (found := told.get(name)) is not None]
        return Facts(
            at_s=time.monotonic(),
            unix_s=time.time(),
            minute_of_week=minute_of_week(time.localtime()),
            user_idle_s=told.get("user_idle_s"),
            cpu_percent=told.get("cpu_percent"),
            gpu_percent=told.get("gpu_percent"),
            running=running(rules.programs),
            is_on_battery=_truth(told.get("is_on_battery")),
            temperature_c=max(celsius, default=None),
            is_metered=_truth(told.get("is_metered")),
        )

    def close(self) -> None:
        """Let go of what is open."""
        self._bus.close()
        self._user.close()

    def _reading(self, name: str) -> float | None:
        found = self._sources[name]()
        if not isinstance(found, Missing):
            self.missing.pop(name, None)
            self._told.add(name)
            return float(found)
        self.missing[name] = found
        if name in self._told:
            self._told.remove(name)
            log.warning("no longer seen: %s because=%s", NAMES[name], found.why)
        return None


def minute_of_week(at: time.struct_time) -> float:
    """From Monday 00:00 in local time."""
    return (at.tm_wday * 24 + at.tm_hour) * 60 + at.tm_min + at.tm_sec / 60


def _truth(value: float | None) -> bool | None:
    return None if value is None else bool(value)
