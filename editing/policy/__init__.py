"""A server's policy: edits that its operator puts on every sampled MODEL, and the record of what they did."""
