"""What can be wrong with a model, a checkpoint or a partition."""

from __future__ import annotations


class ModelError(ValueError):
    """Base of every error about a model; the message says what is wrong, where, what to do.

    A `ValueError`, which services take for a wrong configuration and exit with code 2.
    """


class UnsupportedModelError(ModelError):
    """The model is intact but not of a kind that Miaotui can serve."""


class CheckpointError(ModelError):
    """The model directory is missing, incomplete or damaged."""


class PartitionError(ModelError):
    """The stages asked for do not cut the model's layers."""


class BatchError(ModelError):
    """The inputs given to a stage do not fit it (shape, lengths, ids out of range)."""
