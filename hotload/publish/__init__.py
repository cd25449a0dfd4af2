"""May we publish, what, and who: the chain, the lease, readiness, and the service's wire format."""
