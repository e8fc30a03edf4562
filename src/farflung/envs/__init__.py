"""Environments: tasks, prompts and scores, and the child process in which they run."""
