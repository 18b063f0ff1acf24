"""Models as pure functions over a params tree."""
