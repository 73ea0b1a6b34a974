"""How a trace, or a table of counts, is got at: rows, names, counts and text."""
