"""Which experts need to be near: how cold they are, and what a cache of them would hit."""
