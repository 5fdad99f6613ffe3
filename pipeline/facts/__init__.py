"""Facts that changed: the record, readers for the schemas in use, conflicts, and how a question becomes a
model's input.
"""
