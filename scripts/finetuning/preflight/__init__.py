"""Everything that can be refused before weights are loaded, and the memory that a launch needs."""
