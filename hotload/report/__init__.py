"""What a person looks at after a cycle: the report, its metrics and its page."""
