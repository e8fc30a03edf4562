"""Flow of rollouts, the data path: submit, validate, intake, score, accept, select, commit."""
