"""What a person looks at after a cycle: the report, its metrics, its page and the run's."""

__all__ = [
    "charts",
    "cycle_report",
    "markdown",
    "metrics",
    "page",
    "page_parts",
    "page_sections",
    "run_history",
    "run_page",
    "sample_statistics",
    "templating",
]
