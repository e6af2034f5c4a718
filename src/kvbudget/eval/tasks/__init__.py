"""Tasks: seeded examples whose answers are read under teacher forcing, one file per family."""
