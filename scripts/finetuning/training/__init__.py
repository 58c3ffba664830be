"""The Trainer with its checkpoints, activation checkpointing and resuming."""
