"""Subtraction of what a fine-tuning changed, streamed from tensor sources to a model folder: theta' = base -
scale * (tuned - base).
"""
