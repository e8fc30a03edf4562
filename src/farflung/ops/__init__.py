"""Commands that drive roles or look after a run."""
