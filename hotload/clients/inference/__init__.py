"""The inference endpoints: one request, its attempts, and the window they share."""
