"""What a sample is worth: rewards, their built-ins and sums, and advantages."""

__all__ = [
    "advantages",
    "answers",
    "built_ins",
    "choice",
    "final_number",
    "http_service",
    "math_answer",
    "outcome",
    "weighted_sum",
]
