"""Wire dialects: paths, headers, bodies and misspellings of each receiver, and nothing else knows them."""
