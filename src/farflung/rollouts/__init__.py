"""Flow of rollouts: from generated tokens, by intake, audit and score, to a batch and its commit."""
