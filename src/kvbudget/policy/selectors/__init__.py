"""Selectors: what a query reads of the entries that are held, one file per idea."""
