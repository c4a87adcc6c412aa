"""The picture world: scenes, what is said of them, and the checker of what is said."""
