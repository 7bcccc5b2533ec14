"""Files of other projects made into ours: one-off commands."""
