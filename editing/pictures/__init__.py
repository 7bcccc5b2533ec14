"""Plots and heat maps as pictures."""
