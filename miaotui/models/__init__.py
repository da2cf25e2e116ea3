"""Models: how each family splits into stages, and how a stage is read from a checkpoint."""
