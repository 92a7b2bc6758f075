"""Around the operator in a training step: states, collection, ranks, settings, metrics."""
