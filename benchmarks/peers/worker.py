"""Runs kvpress presses and transformers' QuantizedCache in an environment of their own; speaks JSON lines.

A request is one line on standard input, the answer one line on standard output:

``{"open": folder, "threads": n}`` loads a model and answers ``{"versions": {...}}``;
``{"context": [ids]}`` sets the context and answers ``{}``;
``{"press": name, "options": {...}, "ratio": r, "probes": [[question, answer, skip], ...], "file": path}`` prefills the
context under a press (None: no compression; ``"quantized"``: transformers' QuantizedCache), teacher-forces every probe from
a copy of the cache, writes the logits that predict the scored answer tokens to ``path`` (float32, all probes one after the
other) and answers ``{"kept_share", "nbytes", "seconds"}``. A failure is answered by ``{"error": text}``.
"""

import contextlib
import copy
import json
import logging
import sys
import time
from importlib.metadata import version

import kvpress
import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache
from transformers.utils.logging import disable_progress_bar

PACKAGES = ("kvpress", "transformers", "torch")


class Worker:
    """Holds the model and the context between requests."""

    def answer(self, request):
        """The answer to one request."""
        if "open" in request:
            torch.set_num_threads(request["threads"])
            self.model = AutoModelForCausalLM.from_pretrained(request["open"], dtype=torch.float32).eval()
            return {"versions": {name: version(name) for name in PACKAGES}}
        if "context" in request:
            self.context = torch.tensor([request["context"]])
            return {}
        begin = time.perf_counter()
        cache = self.prefill(request["press"], request["options"], request["ratio"])
        seconds = time.perf_counter() - begin
        rows = [self.read(cache, *probe) for probe in request["probes"]]
        np.concatenate(rows).tofile(request["file"])
        return {"kept_share": self.kept_share(cache), "nbytes": self.nbytes(cache), "seconds": seconds}

    def prefill(self, press, options, ratio):
        """The context's cache, compressed."""
        for layer in self.model.model.layers:
            layer.self_attn.masked_key_indices = None
        if press == "quantized":
            cache, scope = QuantizedCache(config=self.model.config, **options), contextlib.nullcontext()
        else:
            cache, scope = DynamicCache(), contextlib.nullcontext()
            if press is not None:
                scope = make_press(press, options, ratio)(self.model)
        with scope:
            self.model.model(input_ids=self.context, past_key_values=cache)
        return cache

    def read(self, cache, question, answer, skip):
        """Logits ``[n, V]`` of the scored answer tokens, as kvpress's own pipeline places them: positions go on."""
        ids = torch.tensor([(question + answer)[:-1]])
        own = copy.copy(cache)
        # Layers replace their tensors when they grow, so these may be shared.
        own.layers = [copy.copy(layer) for layer in cache.layers]
        # Many queries at once need one mask for all layers, and a fake key that none of them attends to.
        uneven = len({cache.get_seq_length(layer) for layer in range(len(cache.layers))}) > 1
        width = 1 if self.masked() or uneven else ids.shape[1]
        rows = []
        for begin in range(0, ids.shape[1], width):
            position = self.context.shape[1] + begin
            step = ids[:, begin : begin + width]
            positions = torch.arange(position, position + step.shape[1])[None]
            rows.append(self.model(step, past_key_values=own, position_ids=positions).logits[0].float())
        return torch.cat(rows)[len(question) - 1 + skip :].numpy()

    def masked(self):
        """How many entries head-wise presses hide (they free nothing)."""
        found = [getattr(layer.self_attn, "masked_key_indices", None) for layer in self.model.model.layers]
        return sum(len(indices[0]) for indices in found if indices is not None)

    def kept_share(self, cache):
        """Entries that attention still sees, over those of the context."""
        if isinstance(cache, QuantizedCache):
            return 1.0
        heads = self.model.config.num_key_value_heads
        held = sum(layer.keys.shape[2] * heads for layer in cache.layers) - self.masked()
        return held / (self.context.shape[1] * heads * len(cache.layers))

    @staticmethod
    def nbytes(cache):
        """Bytes of the tensors that the cache holds."""
        total = 0
        for layer in cache.layers:
            for name in ("keys", "values", "_quantized_keys", "_quantized_values"):
                tensor = getattr(layer, name, None)
                parts = [getattr(tensor, inner, None) for inner in ("_data", "_scale", "_shift")]
                for part in parts if any(p is not None for p in parts) else [tensor]:
                    part = getattr(part, "_data", part)
                    total += 0 if part is None else part.untyped_storage().nbytes()
        return total


def make_press(name, options, ratio):
    """A press by name; ``Outer(Inner)`` wraps one, and ``options`` are the inner one's."""
    outer, _, inner = name.rstrip(")").partition("(")
    filters = options.pop("q_filters", None)
    press = getattr(kvpress, inner or outer)(compression_ratio=ratio, **options)
    if filters is not None:
        press.q_filters = -torch.tensor(filters)  # it keeps the keys that project least
        press.post_init_from_model = lambda model: None
    return getattr(kvpress, outer)(press) if inner else press


@torch.inference_mode()
def main():
    """Answers requests until standard input ends; whatever others print goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    logging.disable(logging.WARNING)
    disable_progress_bar()
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
