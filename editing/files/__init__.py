"""Learned files: strict readers and a writer that is whole or nothing."""
