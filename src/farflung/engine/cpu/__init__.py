"""The decoder that is made for CPUs alone, and tested against the plain loop (`engine/plain.py`)."""
