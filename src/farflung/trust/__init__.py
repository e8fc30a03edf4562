"""Whom to audit, and what the evidence says: pure functions, no torch."""
