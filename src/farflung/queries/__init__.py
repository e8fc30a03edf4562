"""What API, commands, summary and pages read of a run: bounded queries, nothing is written."""
