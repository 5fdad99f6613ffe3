"""Tensor sources: anything that yields named tensors slice by slice, read in place and never whole; and the
writer.
"""
