"""Attacks and faults on purpose, on a schedule, and the result of each adversary."""
