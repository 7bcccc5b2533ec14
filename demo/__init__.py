"""The emoji world: data, model, training, judge and weights of the demo model."""
