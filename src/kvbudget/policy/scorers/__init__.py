"""Scorers: which entries matter, one file per signal."""
