"""Reads of a run for API, commands, summary and pages: bounded queries, nothing is written."""
