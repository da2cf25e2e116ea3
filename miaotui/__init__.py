"""Miaotui: real-time question answering by a model split over several machines."""

__version__ = "0.1.0"
