"""Graded exercises: parts of BLIP that a student writes, predicts or mends; start at README.md."""
