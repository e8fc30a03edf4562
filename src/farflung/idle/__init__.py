"""A machine on loan: it works while its owner does not need it. Facts, a decision, and what a node does then."""
