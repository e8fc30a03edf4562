"""Engines: seeded generation and its replay, in this process or by a vLLM server."""
