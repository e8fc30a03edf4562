"""Trouble on purpose: faults on a schedule, and the result of each adversary."""
