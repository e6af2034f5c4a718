"""Saved caches: a cache as a file, without loss or transform-coded, and back for a live model."""

from kvbudget.storage.save import Saved, load, save

__all__ = ["Saved", "load", "save"]
