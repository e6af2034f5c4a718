"""kvbudget: run any Hugging Face causal language model inside a KV-cache budget."""

__version__ = "0.1.0"
