"""What a person looks at after a cycle: the report, its metrics, its page and the run's."""

__all__ = [
    "chart_shapes",
    "cycle_page",
    "cycle_page_sections",
    "cycle_report",
    "earlier_run",
    "markdown",
    "metrics",
    "page_parts",
    "run_history",
    "run_page",
    "sample_statistics",
    "templating",
    "training_page",
    "training_table",
]
