"""Trust: the choice of audits, and the test on their evidence. Pure functions, no torch."""
