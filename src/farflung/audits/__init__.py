"""The trust path: draw, replay, verdict, penalties; canaries, possession, breaker and tripwire."""
