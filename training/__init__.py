"""What a run consists of, and what keeps it safe: processes, checkpoints, the log."""
