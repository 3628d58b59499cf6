"""Outdated weights, the base they belong to and the base they go onto: opened and verified once, in this order."""
