"""Destinations: what happens to entries that are not kept in place, one file per idea."""
