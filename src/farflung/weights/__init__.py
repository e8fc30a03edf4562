"""Flow of weights: from the trainer's step to every engine, each byte checked."""
