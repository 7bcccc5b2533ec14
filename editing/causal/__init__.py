"""The causal period: its search, and what is kept of it."""
