"""kvbudget.generate: one call from a prompt to an answer under a budget, with what it cost."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, TextStreamer

from kvbudget.auto import choose
from kvbudget.budget import Budget
from kvbudget.cache import KVCache
from kvbudget.driver import revising
from kvbudget.errors import CacheError, KVBudgetError
from kvbudget.policy.base import Recipe, Span
from kvbudget.policy.policy import Policy
from kvbudget.prefill import Prefilled, Progress
from kvbudget.report import CacheReport

Message = dict[str, str]
Ready = Callable[[KVCache, Tensor], None]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Generation:
    """An answer and what it cost.

    ``token_ids`` are the new tokens, ``prompt_tokens`` counts those of the whole prompt, question included.
    ``prefill_seconds`` runs until the first new token is there, ``decode_seconds`` from there on. ``cache`` holds the
    prompt and the answer but for its last token, and can be passed to the next call. ``interrupted`` says that the answer
    ends where the user stopped it.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    report: CacheReport
    prefill_seconds: float
    decode_seconds: float
    cache: KVCache = field(repr=False)
    interrupted: bool = False

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens after the first, per second (0 where there are none)."""
        return (len(self.token_ids) - 1) / self.decode_seconds if len(self.token_ids) > 1 else 0.0


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    *,
    policy: Policy | Recipe | str | Path = "auto",
    budget: Budget | str | float | None = None,
    max_new_tokens: int = 256,
    question: str | None = None,
    question_visible: bool = False,
    protect: str | Sequence[Span] = (),
    chunk_size: int | None = None,
    chat: bool = True,
    cache: KVCache | None = None,
    stream: Callable[[str], None] | Any | None = None,
    progress: Progress | None = None,
    filled: Callable[[KVCache], None] | None = None,
    ready: Ready | None = None,
    seed: int | None = None,
    do_sample: bool = False,
    allow_long: bool = False,
    **options: Any,
) -> Generation:
    """Answers a prompt under a budget.

    Args:
        prompt: a text, which the tokenizer's chat template makes a user's message of, or a list of messages
            ``{"role": ..., "content": ...}``.
        policy, budget: as for `KVCache`; ``"auto"`` picks by `kvbudget.auto.choose`, and the report says why.
        question: asked after the prompt. It is not looked at when the prompt is compressed, so that the same cache could
            answer others, unless ``question_visible``.
        protect: a role (``"system"``) or half-open ranges of token positions that stay whatever the policy says.
        chunk_size: tokens per forward of the prefill; see `KVCache.prefill`.
        chat: use the chat template, if the tokenizer has one; without, the prompt is a plain text to continue.
        cache: goes on from a cache of an earlier call, or a fork of it; the prompt must begin with what it has seen.
        stream: called with each piece of text, or a streamer of transformers.
        progress: called with tokens done and in total during the prefill.
        filled: called once with the cache when it holds what was prefilled: the prompt but for its last token, and but for a
            question that is not visible. It may be saved there.
        ready: called once with the cache and the next token's logits ``[1, V]``, when the prompt has been seen and nothing
            has been answered; a fork made there can be asked something else. Its time is not counted.
        seed: of the sampling; the global random state stays as it is.
        allow_long: only warn where prompt and answer go beyond the positions that the model was trained for.
        **options: passed on to ``model.generate`` (temperature, top_p, num_beams, ...).

    Raises:
        KVBudgetError: for an empty prompt, one that is too long, or messages without a chat template; see also `KVCache`.

    A KeyboardInterrupt while decoding ends the answer, which is returned with ``interrupted=True``.
    """
    encode = _encoder(tokenizer, prompt, chat)
    context = _messages(prompt)
    asked = context if question is None else _with_question(context, question)
    ids = torch.tensor([encode(asked)], device=model.device)
    prompt_tokens = ids.shape[1]
    _check_length(model, prompt_tokens, max_new_tokens, allow_long)
    hidden = question is not None and not question_visible
    beams = options.get("num_beams") or 1
    if options.get("num_return_sequences", 1) != 1 or (beams > 1 and stream is not None):
        raise KVBudgetError("one answer at a time: num_return_sequences must be 1, and beams cannot be streamed")
    if cache is None:
        spans = _role_spans(encode, asked, protect) if isinstance(protect, str) else protect
        cache = _new_cache(model, policy, budget, spans, prompt_tokens, max_new_tokens, not hidden)
    elif policy != "auto" or budget is not None or protect:
        raise KVBudgetError("a cache brings its own policy, budget and protected spans; pass either it or them")

    begun = time.perf_counter()
    # generate() needs a token that the cache has not seen, so the last one is left to it.
    known = _common_prefix(ids[0].tolist(), encode(context)) if hidden else prompt_tokens - 1
    warm = cache.get_seq_length() > 0
    _fill(cache, model, ids, min(known, prompt_tokens - 1), chunk_size, tokenizer, progress)
    if filled is not None:
        filled(cache)
    cache.question_visible = not (hidden or warm or (cache.prefilled is not None and cache.prefilled.blind))
    if beams > 1:
        cache.batch_repeat_interleave(beams)

    steps = _Steps()
    streamer = _streamer(stream, tokenizer)
    criteria = [*(options.pop("stopping_criteria", None) or []), steps]
    watch = _Watch(cache, ready)
    processors = [watch, *(options.pop("logits_processor", None) or [])]
    interrupted = False
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            with revising(model, cache):
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=max_new_tokens,
                    do_sample=do_sample, stopping_criteria=criteria, logits_processor=processors, streamer=streamer,
                    **options,
                )  # fmt: skip
        except KeyboardInterrupt:
            out, interrupted = ids if steps.ids is None else steps.ids, True
            if streamer is not None:
                streamer.end()
    ended = time.perf_counter()
    if beams == 1:
        cache.prefilled = Prefilled.of(out[:, : cache.get_seq_length()])
    new = out[0, prompt_tokens:].tolist()
    first = steps.first or ended
    return Generation(
        text=tokenizer.decode(new, skip_special_tokens=True),
        token_ids=tuple(new),
        prompt_tokens=prompt_tokens,
        report=cache.report(),
        prefill_seconds=first - begun - watch.seconds,
        decode_seconds=ended - first,
        cache=cache,
        interrupted=interrupted,
    )


class _Steps(StoppingCriteria):
    """Stops nothing: keeps the ids after every step, for an interrupt, and the time of the first."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.first: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.ids, self.first = input_ids, self.first or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Watch(LogitsProcessor):
    """Changes nothing: lets the caller look at the cache before the first new token is chosen."""

    def __init__(self, cache: KVCache, ready: Ready | None) -> None:
        self.cache, self.ready = cache, ready
        self.seconds = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.ready is not None:
            begun = time.perf_counter()
            self.ready(self.cache, scores.float())
            self.ready, self.seconds = None, time.perf_counter() - begun
        return scores


class _Calling(TextStreamer):
    """Hands finished pieces of text to a function."""

    def __init__(self, call: Callable[[str], None], tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.call = call

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.call(text)


def _streamer(stream: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    return stream if stream is None or hasattr(stream, "put") else _Calling(stream, tokenizer)


def _new_cache(
    model: PreTrainedModel,
    policy: Policy | Recipe | str | Path,
    budget: Budget | str | float | None,
    spans: Sequence[Span],
    prompt_tokens: int,
    max_new_tokens: int,
    question_visible: bool,
) -> KVCache:
    if policy != "auto":
        return KVCache(model, policy, budget, protect=spans)
    budget = Budget.parse(budget)
    choice = choose(
        model,
        budget,
        length=prompt_tokens,
        new_tokens=max_new_tokens,
        question_visible=question_visible,
        can_prefill=True,
    )
    _log.info("policy %s: %s", choice.policy, choice.reason)
    cache = KVCache(model, choice.policy, budget, protect=spans)
    cache.reason = choice.reason
    return cache


def _fill(
    cache: KVCache,
    model: PreTrainedModel,
    ids: Tensor,
    known: int,
    chunk_size: int | None,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress | None,
) -> None:
    """Prefills the first ``known`` tokens, as far as the cache has not seen them."""
    seen = cache.get_seq_length()
    if known > seen:
        cache.prefill(model, ids[:, :known], chunk_size=chunk_size, tokenizer=tokenizer, progress=progress)
        return
    if seen >= ids.shape[1]:
        raise CacheError(
            f"the cache has seen {seen} tokens and the prompt has {ids.shape[1]}, so nothing is new; pass the whole "
            "conversation, or a fork made before the last answer"
        )
    cache.prefilled = cache.prefilled or Prefilled.of(ids[:, :0])
    cache.prefilled.check(ids)


def _check_length(model: PreTrainedModel, prompt_tokens: int, max_new_tokens: int, allow_long: bool) -> None:
    if max_new_tokens < 1:
        raise KVBudgetError(f"max_new_tokens={max_new_tokens} leaves nothing to generate; give at least 1")
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    total = prompt_tokens + max_new_tokens
    if not positions or total <= positions:
        return
    message = f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones exceed the model's {positions} positions"
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    if len(tables) > 1:
        raise KVBudgetError(f"{message}, which are a table that ends there; shorten the prompt")
    if not allow_long:
        raise KVBudgetError(
            f"{message}; shorten the prompt, lower max_new_tokens, or go beyond with allow_long=True (--allow-long)"
        )
    warnings.warn(f"{message}; the answer may suffer", stacklevel=3)


def _messages(prompt: str | Sequence[Message]) -> list[Message]:
    """The prompt as messages; a plain text is one of the user's."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise KVBudgetError(f"message {message!r} needs a 'role' and a 'content', both texts")
    if not any(message["content"].strip() for message in messages):
        raise KVBudgetError("the prompt is empty; give a text or messages with content")
    return messages


def _with_question(messages: list[Message], question: str) -> list[Message]:
    """Asks at the end of the user's last message, or in a message of its own after an answer."""
    if not question.strip():
        raise KVBudgetError("the question is empty; leave it out or give a text")
    if messages[-1]["role"] != "user":
        return [*messages, {"role": "user", "content": question}]
    return [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']}\n\n{question}"}]


def _encoder(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message], chat: bool
) -> Callable[[list[Message]], list[int]]:
    """How messages become token ids: by the chat template, or a single text as it is."""
    if chat and getattr(tokenizer, "chat_template", None):

        def templated(messages: list[Message]) -> list[int]:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return tokenizer(text, add_special_tokens=False).input_ids

        return templated
    if not isinstance(prompt, str):
        reason = "chat=False" if getattr(tokenizer, "chat_template", None) else "the tokenizer has no chat template"
        raise KVBudgetError(f"messages need a chat template, and {reason}; pass the prompt as one text")
    return lambda messages: tokenizer(messages[0]["content"]).input_ids


def _role_spans(
    encode: Callable[[list[Message]], list[int]], messages: list[Message], role: str
) -> list[tuple[int, int]]:
    """Positions of the messages of a role: from where a changed beginning shows to where a changed end shows.

    A first message begins at position 0, whatever its template puts before it. Two different marks are tried, because one
    of them may melt into a token of the text.
    """

    def agreed(index: int, begin: str, end: str) -> int:
        changed = {**messages[index], "content": begin + messages[index]["content"] + end}
        return _common_prefix(ids, encode([*messages[:index], changed, *messages[index + 1 :]]))

    ids = encode(messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == role:
            start = min(agreed(index, mark, "") for mark in ("7", "!")) if index else 0
            spans.append((start, max(agreed(index, "", mark) for mark in ("7", "!"))))
    if not spans:
        raise KVBudgetError(f"protect={role!r}: the prompt has no message of this role; pass messages that have one")
    return [span for span in spans if span[0] < span[1]]


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the beginning that two texts share."""
    differs = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differs, min(len(one), len(other)))
