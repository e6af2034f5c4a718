"""Plans as data: how a prompt is driven through the model, executed by `kvbudget.prefill`."""

from __future__ import annotations

from dataclasses import dataclass

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Plan


@dataclass(frozen=True)
class Chunked(Plan):
    """The prompt in chunks of at most ``size`` tokens, evicting after each; 0 feeds it in one pass."""

    size: int = 0


@dataclass(frozen=True)
class Reconstruct(Plan):
    """The whole prompt first, then passes in which the model repeats it chunk by chunk, and only then an eviction.

    The passes run on top of the full cache, their own entries are not kept, and each judges the chunk that it repeats. A
    pass feeds an instruction, the last ``overlap`` tokens before the chunk, the end of the chat turn and the chunk itself
    (KVzip, arXiv 2505.23416, section 3). Without a tokenizer there is no instruction and no turn, only the overlap.

    Attributes:
        chunk: tokens that a pass repeats at most.
        overlap: tokens before the chunk that tell where to start.
        first: instruction of the first chunk.
        later: instruction of the others, which the overlap completes.
        instruction_ids: token ids to use in place of both texts.
    """

    chunk: int = 2048
    overlap: int = 8
    first: str = "\n\nRepeat the previous context exactly."
    later: str = "\n\nRepeat the part of the previous context exactly, starting with "
    instruction_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.overlap < 0:
            raise PolicyError(
                f"chunks of {self.chunk} tokens with an overlap of {self.overlap} cannot be repeated; "
                "give chunk >= 1 and overlap >= 0"
            )
