"""What a sample is worth: rewards, their built-ins and sums, and advantages."""
