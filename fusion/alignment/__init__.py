"""Permutation symmetries of a network, found from its graph, and alignment over them."""
