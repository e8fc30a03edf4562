"""What other programs use of the processor and of GPUs, this node's own processes left out, and which of them run."""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterable
from typing import Any

import psutil

from farflung.idle.sources import WITH_EXTRA, Missing

USED = ("user", "system", "irq", "softirq", "interrupt", "dpc")
"""Seconds of the processor that count as use by others. `nice` is not among them: that work gives way by itself."""
ENDINGS = (".exe", ".app")


def own_root() -> int:
    """The process that this node began with: this one, or the one that started it as a part of the node."""
    parent = multiprocessing.parent_process()
    return os.getpid() if parent is None or parent.pid is None else parent.pid


def own_tree(root: int) -> list[psutil.Process]:
    """The node's processes that live."""
    with contextlib.suppress(psutil.Error):
        first = psutil.Process(root)
        return [first, *first.children(recursive=True)]
    return []


class CpuOfOthers:
    """Percent of all cores that others used since the last look, at normal priority."""

    def __init__(self, root: int) -> None:
        self._root, self._cores = root, psutil.cpu_count() or 1
        self._before = self._count()

    def __call__(self) -> float:
        """Between 0 and 100."""
        (at_s, used_s, own), (before_s, used_before_s, own_before) = self._count(), self._before
        self._before = at_s, used_s, own
        own_s = sum(seconds - own_before.get(process, 0.0) for process, seconds in own.items())
        span_s = max(1e-3, at_s - before_s) * self._cores
        return min(100.0, max(0.0, 100 * (used_s - used_before_s - own_s) / span_s))

    def _count(self) -> tuple[float, float, dict[tuple[int, float], float]]:
        """The time, all use, and that of each own process."""
        times = psutil.cpu_times()
        own = dict(one for process in own_tree(self._root) for one in _use(process))
        return time.monotonic(), sum(getattr(times, name, 0.0) for name in USED), own


def _use(process: psutil.Process) -> Iterable[tuple[tuple[int, float], float]]:
    with contextlib.suppress(psutil.Error):
        times = process.cpu_times()
        is_nice = os.name == "posix" and process.nice() > 0
        yield (process.pid, process.create_time()), times.system + (0.0 if is_nice else times.user)


class GpuOfOthers:
    """Percent of the busiest GPU that other programs use, and the hottest one's degrees, as NVML tells them."""

    def __init__(self, root: int) -> None:
        self._root, self._since_us = root, 0
        self._nvml: Any = None
        self._failure: Missing | None = None

    def __call__(self) -> float | Missing:
        """Of each process the last sample since the last look."""
        devices = self._devices()
        if isinstance(devices, Missing):
            return devices
        own = {process.pid for process in own_tree(self._root)}
        since_us, self._since_us = self._since_us or int((time.time() - 2) * 1e6), int(time.time() * 1e6)
        return max(self._percent(device, own, since_us) for device in devices)

    def temperature_c(self) -> float | Missing:
        """Of the hottest."""
        devices = self._devices()
        if isinstance(devices, Missing):
            return devices
        kind = self._nvml.NVML_TEMPERATURE_GPU
        try:
            return max(float(self._nvml.nvmlDeviceGetTemperature(device, kind)) for device in devices)
        except self._nvml.NVMLError as error:
            return Missing(f"NVML tells no temperature: {error}")

    def _devices(self) -> list[Any] | Missing:
        if self._nvml is None and self._failure is None:
            self._failure = self._begin()
        if self._failure is not None:
            return self._failure
        nvml = self._nvml
        try:
            found = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
        except nvml.NVMLError as error:
            return Missing(f"NVML does not answer: {error}")
        return found or Missing("NVML knows no GPU")

    def _begin(self) -> Missing | None:
        """Once: no driver comes while a node runs."""
        try:
            import pynvml
        except ImportError:
            return Missing("the package nvidia-ml-py is not installed", WITH_EXTRA)
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            return Missing(f"no driver of NVIDIA answers: {error}")
        self._nvml = pynvml
        return None

    def _percent(self, device: Any, own: set[int], since_us: int) -> float:
        try:
            samples = self._nvml.nvmlDeviceGetProcessUtilization(device, since_us)
        except self._nvml.NVMLError:  # nothing ran since, it says, by an error
            return 0.0
        latest = {one.pid: one.smUtil for one in sorted(samples, key=lambda one: one.timeStamp)}
        return float(min(100, sum(percent for pid, percent in latest.items() if pid not in own)))


def running(programs: Iterable[str]) -> frozenset[str]:
    """Those of the named programs of which a process runs, by the name of its file in any case."""
    wanted = {_plain(name): name for name in programs}
    if not wanted:
        return frozenset()
    names = {_plain(process.info["name"] or "") for process in psutil.process_iter(["name"])}
    return frozenset(name for plain, name in wanted.items() if plain in names or plain[:15] in names)


def _plain(name: str) -> str:
    """In lower case, without what the platform ends it with. Linux keeps 15 characters of a name."""
    found = name.lower()
    for ending in ENDINGS:
        found = found.removesuffix(ending)
    return found
