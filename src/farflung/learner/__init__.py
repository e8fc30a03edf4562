"""The mathematics of a training step: loss, packing, optimizer, checkpoints, ranks."""
