"""What a training run leaves in its folder: checkpoints, metrics and pictures."""
