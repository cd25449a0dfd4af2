"""One verb a module; the only place that retries and caches."""
