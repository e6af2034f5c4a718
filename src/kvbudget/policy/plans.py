"""Plans as data: how a prompt is driven through the model, executed by `kvbudget.prefill`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvbudget.errors import PolicyError
from kvbudget.policy.base import Plan, Protect, Scorer


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


@dataclass(frozen=True)
class Reread(Plan):
    """The whole prompt first, then a pass in which the model reads it again and judges all of it, and only then an eviction.

    The pass runs on top of the full cache and nothing of it is kept (KVCompose, arXiv 2509.05165, section 3, where no task
    prompts are given).
    """


@dataclass(frozen=True)
class QuestionChunks(Plan):
    """The prompt in chunks; after each, the question judges everything held, and the budget so far decides what stays.

    A share of the budget is granted that grows with the text (Finch, arXiv 2408.00167, section 3), less the question, which
    comes afterwards. Without ``question_ids`` the last ``window`` tokens of the prompt are the question, and are fed last.

    Attributes:
        chunk: tokens per chunk (0: as many as the budget holds entries).
        window: tokens at the end of the prompt that stand for the question.
    """

    uses_question: ClassVar[bool] = True

    chunk: int = 0
    window: int = 32


@dataclass(frozen=True)
class Lookahead(Plan):
    """The whole prompt, then a draft of the answer on a compressed copy, whose queries judge the prompt (arXiv 2505.20334).

    Nothing of the draft stays: neither tokens nor entries.

    Attributes:
        tokens: of the draft; it ends earlier where every sequence is complete, or where the model's positions end.
        draft: what compresses the copy, to the same budget; it reads the states of the policy's scorer.
        protect: what stays in the copy whatever it scores.
    """

    tokens: int
    draft: Scorer
    protect: Protect


@dataclass(frozen=True)
class Episode(Plan):
    """The prompt in blocks under the budget; after each, the text of one episode judges everything held (arXiv 2509.17396).

    Windows of the prompt are clustered by the mean of their token embeddings; the episode is the cluster nearest to the
    question, and its text the ``medoids`` windows nearest to the cluster's center, in order. Without a question all of the
    prompt is one episode.

    Attributes:
        block: tokens per block.
        episodes: clusters.
        window: tokens per window.
        medoids: windows that speak for an episode.
        only: number of the episode that judges (None: the question's).
    """

    uses_question: ClassVar[bool] = True

    block: int = 512
    episodes: int = 4
    window: int = 128
    medoids: int = 8
    only: int | None = None
