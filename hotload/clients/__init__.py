"""Network: the store, the service, inference, the hand-off and metrics, without an engine."""
