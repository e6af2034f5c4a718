"""The vocabulary of policies: signals, scorers, allocators, granularity, destinations, triggers and plans."""
