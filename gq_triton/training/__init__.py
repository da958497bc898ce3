"""A run of launch/train.py: its options, parts, steps, checkpoints, metrics and picture."""
