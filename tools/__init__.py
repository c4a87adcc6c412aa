"""Measurements and demonstrations: nothing that a reader of the paper has to open."""
