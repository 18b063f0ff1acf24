"""Many requests, each with an adapter of its own, answered in one running batch."""
