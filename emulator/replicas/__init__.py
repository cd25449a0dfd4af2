"""The fleet: the service, its replicas, what they load and serve."""
