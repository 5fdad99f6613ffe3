"""Changed facts: the record, a reader for each schema, contradictions, and how a question becomes tokens."""
