"""Solutions of the exercises, under the same file names: look here last."""
