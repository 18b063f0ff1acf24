"""Many adapters of one base, served at once. Nothing is imported here: the server needs the extra."""
