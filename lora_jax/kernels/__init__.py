"""Fused kernels, one folder an operation: a reference in plain XLA beside each backend."""
