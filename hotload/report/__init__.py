"""What a person looks at after a cycle: the report, its metrics and its page."""

__all__ = [
    "charts",
    "cycle_report",
    "markdown",
    "markup",
    "metrics",
    "page",
    "page_samples",
    "page_sections",
    "page_style",
    "sample_statistics",
]
