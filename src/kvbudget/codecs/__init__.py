"""Codecs: how kept keys and values are stored."""
