"""Measures, numbers on the screen, sheets of pictures."""
