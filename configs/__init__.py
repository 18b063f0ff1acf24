"""Configurations, one a model; each file's `get_config` returns an `ml_collections.ConfigDict`."""
