"""Flow of tasks: from an environment's questions to a lease that one node holds."""
