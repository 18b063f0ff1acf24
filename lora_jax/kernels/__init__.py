"""One folder an operation: a reference in plain XLA, and kernels beside it."""
