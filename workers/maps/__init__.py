"""Redundancy maps: measuring them (`measure`, `damage`), what one holds (`redundancy`), a model's own."""
