"""The cost of a compiled step on a device that need not be present: memory, FLOPs, collectives."""
