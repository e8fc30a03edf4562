"""Models as files and as arithmetic: shared by learner, engine and tasks."""
