"""Segments: where entries live; each appends, takes, attends and counts its bytes."""
