"""Divergences, intervals, permutation tests, and the shapes that arrays must have."""
