"""Battery and temperature of the machine, as its sensors tell them."""

import sys

import psutil

from farflung.idle.sources import Missing

OF_PROCESSOR = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal", "soc_thermal", "acpitz")
"""Names of the sensors, by their drivers in Linux."""
SENSIBLE_C = (1.0, 150.0)
"""A sensor that tells less or more is broken."""


def on_battery() -> float | Missing:
    """1 while nothing charges it."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is None or battery.power_plugged is None:
        return Missing("no battery is here")
    return float(not battery.power_plugged)


def temperature_c() -> float | Missing:
    """Of the hottest part of the processor."""
    if not hasattr(psutil, "sensors_temperatures"):
        return Missing(f"no library tells it on {sys.platform}")
    low, high = SENSIBLE_C
    groups = psutil.sensors_temperatures()
    found = [one.current for name in OF_PROCESSOR for one in groups.get(name, ()) if low <= one.current <= high]
    return max(found) if found else Missing("no sensor of the processor is here")
