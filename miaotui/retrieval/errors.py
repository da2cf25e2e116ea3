"""What can go wrong with documents."""

from __future__ import annotations


class RetrievalError(Exception):
    """Base of all; the message is for people, and quotes nothing of a document."""


class UnreadableError(RetrievalError):
    """A document that cannot be taken: its kind, its encoding, damage, size or emptiness."""


class CollectionNameError(RetrievalError):
    """A collection's name that is not allowed."""


class StoreError(RetrievalError):
    """A collection's file cannot be used."""
