"""Training, checkpoints, and `TrainingWrapper`, which ties a store to a model."""
