"""Counting: what most analyses follow from, what there is, and whether two captures agree."""
