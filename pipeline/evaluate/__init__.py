"""Scores of a model on facts, under three named protocols: token, probability and generation."""
