"""Refinements: which entries stay once their number is known, one file per idea."""
