"""Allocators: how many entries each layer and each KV head may keep, one file per idea."""
