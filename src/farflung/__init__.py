"""Reinforcement learning for reasoning models on far-flung machines that nobody has to trust."""
