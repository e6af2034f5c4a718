"""lm-eval adapter: EleutherAI's evaluation harness drives a model whose cache is under a policy and a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvbudget.budget import Budget
from kvbudget.cache import KVCache
from kvbudget.errors import KVBudgetError
from kvbudget.eval.generation import generate
from kvbudget.models import load
from kvbudget.policy.policy import Policy

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    INSTALLED = True
except ImportError:
    INSTALLED = False
    TemplateLM = object

    def register_model(name: str) -> Callable[[type], type]:
        """Nothing to register with."""
        return lambda kind: kind


@register_model("kvbudget")
class KVBudgetLM(TemplateLM):
    """A model under a policy, for ``lm_eval.simple_evaluate(model=KVBudgetLM(...), tasks=[...])``.

    Every request's context is prefilled into a fresh cache and compressed; only then are the continuation's tokens
    scored or generated. The question is part of that context, so it is visible when the cache is compressed. Requests
    that share a context (multiple choice) share its cache.

    Args:
        model: a loaded model (then give ``tokenizer`` too), or what `kvbudget.load` takes.
        policy, budget: as of `KVCache`.
        max_length: tokens of context and continuation together; the oldest go first. None: the model's positions.
        max_gen_toks: tokens of a generated answer where the task does not say.
        rolling_step: tokens fed per forward when a whole text is scored: the policy acts between them, so every token is
            predicted from a compressed cache.

    Raises:
        KVBudgetError: when lm_eval is not installed, or an argument does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        policy: Policy | str = "full",
        budget: Budget | str | float | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        rolling_step: int = 32,
        dtype: str | None = None,
        **ignored: Any,
    ) -> None:
        if not INSTALLED:
            raise KVBudgetError("the adapter needs the package lm_eval; run: pip install lm_eval")
        super().__init__()
        if isinstance(model, PreTrainedModel):
            if tokenizer is None:
                raise KVBudgetError("a loaded model needs tokenizer= beside it")
            self.model, self.tokenizer = model, tokenizer
        else:
            self.model, self.tokenizer = load(model, dtype=dtype)
        self.policy, self.budget = policy, budget
        positions = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.max_length = max_length or positions or 4096
        self.max_gen_toks = max_gen_toks
        self.rolling_step = rolling_step
        self._device = self.model.device
        self._last: tuple[tuple[int, ...], KVCache] | None = None

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without a context begins after."""
        return self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """Marks request caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A dialogue as one text, by the tokenizer's template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; by default with special tokens unless the text already begins with them."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False).input_ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results = []
        for texts, context, continuation in requests:
            results.append(result := self._score(context, continuation))
            self.cache_hook.add_partial("loglikelihood", texts, result)
        self._last = None
        return results

    @torch.inference_mode()
    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        if len(continuation) >= self.max_length:
            raise KVBudgetError(
                f"a continuation of {len(continuation)} tokens leaves no room for a context within max_length="
                f"{self.max_length}; raise it"
            )
        context = context[-(self.max_length - len(continuation)) :]
        # The last token of the context is fed with the continuation, whose first token the compressed cache must predict.
        cache = self._filled(context[:-1]).fork()
        fed = torch.tensor([[*context[-1:], *continuation[:-1]]], device=self._device)
        return self._read(self.model(fed, past_key_values=cache).logits[0], continuation)

    def _read(self, logits: torch.Tensor, targets: Sequence[int]) -> tuple[float, bool]:
        wanted = torch.tensor(targets, device=logits.device)
        chosen = logits.float().log_softmax(-1).gather(-1, wanted[:, None])
        return float(chosen.sum()), bool((logits.argmax(-1) == wanted).all())

    def _filled(self, ids: Sequence[int]) -> KVCache:
        """A cache compressed after ``ids``; the last one is remembered."""
        key = tuple(ids)
        if self._last is None or self._last[0] != key:
            cache = KVCache(self.model, self.policy, self.budget, max_length=len(ids) or None)
            if ids:
                cache.prefill(self.model, torch.tensor([key], device=self._device))
            self._last = key, cache
        return self._last[1]

    @torch.inference_mode()
    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts (nats), each read through a cache that stays within its budget."""
        results = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False), self.prefix_token_id, self.max_length, context_len=1
            )
            total = sum(self._stream(*make_disjoint_window(window)) for window in windows)
            results.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return results

    def _stream(self, context: Sequence[int], continuation: Sequence[int]) -> float:
        ids = [*context, *continuation]
        cache = KVCache(self.model, self.policy, self.budget, max_length=len(ids))
        if cache.parts.plan is not None:
            raise KVBudgetError(
                f"{self.policy} plans the prefill of a whole prompt and cannot read a text as it comes, as the rolling "
                "log-likelihood does; use a method without a plan"
            )
        rows = [
            self.model(
                torch.tensor([ids[:-1][at : at + self.rolling_step]], device=self._device), past_key_values=cache
            )
            .logits[0]
            .float()
            for at in range(0, len(ids) - 1, self.rolling_step)
        ]
        return self._read(torch.cat(rows)[-len(continuation) :], continuation)[0]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to the first of the stop texts in ``until``.

        Raises:
            KVBudgetError: when a task asks for sampling.
        """
        results = []
        for request in requests:
            context, options = request.args
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise KVBudgetError(
                    "the adapter generates greedily; set do_sample=False in the task's generation_kwargs"
                )
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
            limit = int(options.get("max_gen_toks", self.max_gen_toks))
            ids = self.tok_encode(context)[-(self.max_length - limit) :]
            cache = self._filled(ids[:-1])
            answer = generate(self.model, self.tokenizer, cache, torch.tensor(ids[-1:]), limit, stops)
            results.append(answer)
            self.cache_hook.add_partial("generate_until", request.args, answer)
        self._last = None
        return results
