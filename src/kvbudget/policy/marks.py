"""Marks: what kinds of tokens a text consists of, for policies that judge by the text itself."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL, PUNCTUATION, DELIMITER = 1, 2, 4
"""Bits of a mark: a special token; punctuation only; the end of a phrase, sentence or line."""
_ENDS = ".,;:?!\u2026\u3001\u3002\uff0c\uff1b\uff1a\uff1f\uff01"


def marks_of(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Marks of token ids: uint8, shape of ``ids``. Leading blanks do not matter; a newline ends a line."""
    special = set(tokenizer.all_special_ids)
    known, where = ids.cpu().unique(return_inverse=True)
    marks = [SPECIAL if i in special else mark_of(str(tokenizer.decode([i]))) for i in known.tolist()]
    return torch.tensor(marks, dtype=torch.uint8)[where]


def mark_of(text: str) -> int:
    """The mark of one token's text.

    >>> mark_of(" ,") == PUNCTUATION | DELIMITER, mark_of("(") == PUNCTUATION, mark_of("a.") == 0, mark_of("\\n") == DELIMITER
    (True, True, True, True)
    """
    core = text.strip()
    mark = DELIMITER if "\n" in text and not core else 0
    if core and all(unicodedata.category(c).startswith("P") for c in core):
        mark |= PUNCTUATION | (DELIMITER if core[-1] in _ENDS else 0)
    return mark
