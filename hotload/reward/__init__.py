"""What a sample is worth: rewards, their built-ins and sums, and advantages."""

__all__ = [
    "advantages",
    "built_ins",
    "final_number",
    "http_service",
    "math_answer",
    "outcome",
    "weighted_sum",
]
