"""Measures how far a model is from itself in its own dtype, with plain transformers caches: the floor under any codec's KL.

    python benchmarks/noise_floor.py [--model smollm2-135m] [--dtype bfloat16] [--context 1024] [--texts 4]

The same text through the same weights and the same full cache in other orders of the same sums: scaled dot products against
eager attention, and the continuation in one forward against token by token; then kvbudget's full cache, and int8 in it, against
its own full cache. KL in nats, the mean over the tokens of the continuation, per text.
"""

import argparse

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import kvbudget
from kvbudget.eval.fidelity import compare_logits
from kvbudget.eval.texts import default_source, passages


@torch.inference_mode()
def continued(model: PreTrainedModel, ids: Tensor, context: int, cache: object, step: int) -> Tensor:
    """Logits ``[n, V]`` for every token after the context, which is read at once, ``step`` tokens a forward."""
    logits = [model(ids[:, :context], past_key_values=cache).logits[0, -1:]]
    for begin in range(context, ids.shape[1] - 1, step):
        end = min(begin + step, ids.shape[1] - 1)
        logits.append(model(ids[:, begin:end], past_key_values=cache).logits[0])
    return torch.cat(logits).float()


def main() -> None:
    """Prints a line per pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--text", default=None, help="source of texts, as in kvbudget bench")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--continuation", type=int, default=48)
    parser.add_argument("--texts", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = kvbudget.load(arguments.model, dtype=arguments.dtype)
    length, context = arguments.context + arguments.continuation, arguments.context
    found: dict[str, list[float]] = {}
    for ids in passages(tokenizer, length, arguments.texts, source=arguments.text or default_source()):
        text, following = ids[None], ids[context:]
        logits = {}
        for name, attention, policy, step in (
            ("sdpa", "sdpa", None, length),
            ("eager", "eager", None, length),
            ("token by token", "sdpa", None, 1),
            ("full", "sdpa", "full", length),
            ("full, token by token", "sdpa", "full", 1),
            ("bf16", "sdpa", "bf16", length),
            ("int8", "sdpa", "int8", length),
            ("int8, token by token", "sdpa", "int8", 1),
        ):
            model.set_attn_implementation(attention)
            cache = DynamicCache(config=model.config) if policy is None else kvbudget.KVCache(model, policy)
            logits[name] = continued(model, text, context, cache, step)
        for one, other in (
            ("sdpa", "eager"),
            ("sdpa", "token by token"),
            ("sdpa", "full"),
            ("full", "full, token by token"),
            ("full", "bf16"),
            ("full", "int8"),
            ("full, token by token", "int8, token by token"),
        ):
            found.setdefault(f"{other} against {one}", []).append(
                compare_logits(logits[one], logits[other], following).kl_mean
            )
    for name, kl in found.items():
        print(f"{name}: {sum(kl) / len(kl):.2g} ({', '.join(f'{x:.2g}' for x in kl)})")


if __name__ == "__main__":
    main()
