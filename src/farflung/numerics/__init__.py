"""Models as files and as arithmetic, rounding and packing: shared by learner, engine, weights and tasks."""
