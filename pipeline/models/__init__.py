"""Base models: where a stage's model lies, loading one to run it, making a tiny one, and fetching a packaged
one.
"""
