"""Trouble on purpose: faults on a schedule, and what each adversary comes to."""
