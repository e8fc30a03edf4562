"""The pages of a run, live and read only."""
