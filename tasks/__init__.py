"""The tasks: pretraining and what follows it (BLIP sec. 5), one file each."""
