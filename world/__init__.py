"""The built-in picture world: scenes, what is said of them, and who judges it."""
