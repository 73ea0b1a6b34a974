"""Published formulas, faults included, each beside what is wrong with it."""
