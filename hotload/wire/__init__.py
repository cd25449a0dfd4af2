"""Wire dialects: paths, headers, bodies and misspellings of each receiver, kept in one place."""
