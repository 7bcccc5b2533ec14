"""Erasure from the weights in closed form: nothing is trained, and nothing is left to do while sampling."""
