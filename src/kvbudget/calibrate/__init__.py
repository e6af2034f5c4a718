"""Calibration: offline fitting of what some methods need, kept as safetensors artefacts."""
