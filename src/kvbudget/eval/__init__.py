"""Evaluation: fidelity, tasks, runner and report."""
