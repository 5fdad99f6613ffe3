"""Arithmetic on task vectors: theta' = base - scale * (tuned - base), computed where it is read."""
