"""Work while the owner is away. Facts about a machine, a decision, and what a node does then."""
