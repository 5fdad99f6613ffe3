"""Tensors on disk: sources that are read in slices and never whole, and the one writer of model folders."""
