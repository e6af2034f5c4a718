"""kvbudget: run any Hugging Face causal language model inside a KV-cache budget."""

from kvbudget.budget import Budget
from kvbudget.cache import KVCache
from kvbudget.errors import KVBudgetError
from kvbudget.generate import Generation, generate
from kvbudget.methods import parse as policy
from kvbudget.methods import registry as methods
from kvbudget.models import load

__all__ = ["Budget", "Generation", "KVBudgetError", "KVCache", "generate", "load", "methods", "policy"]
__version__ = "0.1.0"
