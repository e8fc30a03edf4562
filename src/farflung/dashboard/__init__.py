"""Pages, stories and figures: all that people ask of a run, read only."""
