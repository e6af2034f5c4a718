"""Measures orderings that the papers of codecs claim between variants that no policy text names, on real text.

    python benchmarks/codec_orderings.py [--model smollm2-135m] [--text books] [--context 1024] [--texts 4]
        [--markdown docs/codecs.md]

Which saliency or which probes choose the bits, along which axis groups lie, codebooks against even steps, residuals with and
without predictors, and the drafts of a part of the bits against drafts of a part of the entries. Every variant codes the same
contexts; KL is to the full cache over the continuation in nats, paired over the texts. Drafts are greedy, of four tokens, and
what is accepted is their longest beginning that the whole cache continues with. ``kvquant`` and ``aquakv`` are left out where
`kvbudget calibrate` has not been run.
"""

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvbudget
from kvbudget.codecs.adaptive import AdaptiveQuant
from kvbudget.codecs.base import Asked, Codec, Place
from kvbudget.codecs.formats import BFloat16
from kvbudget.codecs.integer import ChannelQuant, TokenQuant
from kvbudget.codecs.levels import SalientQuant
from kvbudget.codecs.ternary import Ternary
from kvbudget.errors import PolicyError
from kvbudget.eval.fidelity import continuation_logits
from kvbudget.eval.rate import measure, true_bits
from kvbudget.eval.replay import record, replay
from kvbudget.eval.stats import compare
from kvbudget.eval.texts import default_source, passages
from kvbudget.files import insert
from kvbudget.methods import parse
from kvbudget.models import fingerprint
from kvbudget.policy.artifact import Artifact, default_path
from kvbudget.policy.base import Recipe
from kvbudget.policy.policy import Policy
from kvbudget.speculate import speculate

DRAFTED = 4


@dataclass(frozen=True)
class Pair(Recipe):
    """Keys behind one codec and values behind another."""

    name, role, phase, paper = "pair", "codec", "prefill and decode", "benchmarks/codec_orderings.py"
    lossless_when_fits = False

    key: Codec = field(default_factory=lambda: TokenQuant(bits=8), repr=False)
    value: Codec = field(default_factory=lambda: TokenQuant(bits=8), repr=False)

    def parts(self) -> dict[str, tuple[Codec, Codec]]:
        return {"codec": (self.key, self.value)}


def pair(key: Codec, value: Codec) -> Policy:
    return Policy((Pair(key=key, value=value),))


@dataclass(frozen=True)
class Accumulated(SalientQuant):
    """Salience by all attention that an entry receives, which favors early tokens (H2O's)."""

    def judge(self, asked: Asked, row: int, keys: Tensor, positions: Tensor) -> Tensor:
        return self._probed(asked, row, keys, positions)[0]


@dataclass(frozen=True)
class Probed(SalientQuant):
    """Salience by as many probes in all as ZipCache's, but by the newest queries alone, or by spread ones alone."""

    newest: bool = True

    def judge(self, asked: Asked, row: int, keys: Tensor, positions: Tensor) -> Tensor:
        steps = (asked.steps[row] >= 0).nonzero()[:, 0]
        count = min(len(steps), max(1, 2 * round(self.probes * len(steps))))
        chosen = steps[-count:] if self.newest else steps[torch.arange(count) * len(steps) // count]
        received = asked.weights(row, chosen, keys, positions).sum((0, 1))
        return received / (asked.steps[row][chosen][:, None] >= positions[None]).sum(0).clamp_min(1)


@dataclass(frozen=True)
class PerToken(Ternary):
    """Ternary codes whose groups are ``unit`` channels of one entry."""

    def encode(self, x: Tensor, place: Place | None = None) -> dict[str, Tensor]:
        groups = x.unflatten(0, (-1, self.unit)).unflatten(-1, (-1, self.unit))
        return super().encode(groups.permute(0, 3, 1, 2).flatten(2).flatten(0, 1))

    def decode(self, columns: dict[str, Tensor], place: Place | None = None) -> Tensor:
        found = super().operand(columns, [0], [0]).block(0, 0, self.unit * len(columns["codes"]))
        groups = found.unflatten(0, (-1, self.unit)).unflatten(-1, (self.unit, -1))
        return groups.permute(0, 2, 3, 1).flatten(2).flatten(0, 1)

    def operand(self, *arguments: object) -> None:
        return None


def salient(kind: type[SalientQuant], **options: object) -> Policy:
    """ZipCache's codes with another salience."""
    sides = parse("zipcache").parts().codec
    return pair(*(kind(**{item.name: getattr(side, item.name) for item in fields(side)}, **options) for side in sides))


def adaptive(keys: int | float, values: int | float) -> Policy:
    """QAQ's codes: so many bits for all entries of a side, or from two to four by a bound below one."""
    shared, codecs = {"residual": 32, "cyclic": True}, []
    for side, what in (("keys", keys), ("values", values)):
        bits = {"low": what, "high": what} if isinstance(what, int) else {"low": 2, "high": 4, "eps": what}
        codecs.append(BFloat16(**shared) if what == 16 else AdaptiveQuant(side=side, **bits, **shared))
    return pair(*codecs)


def variants(model: PreTrainedModel, folder: Path) -> dict[str, Policy]:
    """Policies by the names that the claims give them; those whose calibration is missing are left out."""
    tokens = {"bits": 2, "group": 32, "clip": 0.8, "sinks": 4}
    groups = {"residual": 128, "cyclic": True}
    found = {
        "accumulated": salient(Accumulated),
        "the newest alone": salient(Probed),
        "spread ones alone": salient(Probed, newest=False),
        "values per channel": pair(BFloat16(), Ternary(**groups)),
        "values per token": pair(BFloat16(), PerToken(**groups)),
        "even steps, per channel": pair(BFloat16(), ChannelQuant(bits=2, unit=32, residual=128)),
        "even steps, per token": pair(BFloat16(), TokenQuant(bits=2, group=32, **groups)),
        "qaq(eps=0.1)": adaptive(0.1, 0.1),
        "3 bits for all": adaptive(3, 3),
        "4 and 2 bits": adaptive(4, 2),
        "2 and 4 bits": adaptive(2, 4),
        "values by attention": adaptive(16, 1.0),
        "values in 2 bits": adaptive(16, 2),
        "not rotated": pair(TokenQuant(before_rope=True, **tokens), TokenQuant(**tokens)),
    }
    mark = fingerprint(model)
    for method, name, changed in (
        ("kvquant", "3 bits in even steps", lambda key, x: torch.linspace(-1, 1, 8).expand_as(x)),
        ("aquakv", "without predictors", lambda key, x: x if key == "place" else 0 * x),
    ):
        if default_path(method, mark).exists():
            fitted = Artifact.load(method, mark)
            tensors = {key: changed(key, x) if touched(key) else x for key, x in fitted.tensors.items()}
            path = Artifact(method, mark, tensors, fitted.parameters).save(folder / method)
            found[name] = parse(f"{method}({'sparsity=0, ' * (method == 'kvquant')}file='{path}')")
    return found


def touched(key: str) -> bool:
    """Whether a tensor of a calibration is a codebook of three bits or a predictor."""
    return key in ("keys_3", "values_3") or key.endswith(("_map", "_bias"))


# What is closer to the full cache: the better one and the other, by the names of `variants` or as policies (with a budget).
CLAIMS = (
    ("ZipCache: normalized before accumulated salience", "zipcache", "accumulated"),
    ("ZipCache: newest and earlier probes before the newest alone", "zipcache", "the newest alone"),
    ("ZipCache: the newest alone before earlier ones alone", "the newest alone", "spread ones alone"),
    ("VidKV: values of three levels per channel before per token", "values per channel", "values per token"),
    ("the same, 2 bits in even steps", "even steps, per channel", "even steps, per token"),
    ("QAQ: bits by attention before as many for all", "qaq(eps=0.1)", "3 bits for all"),
    ("the same, values alone", "values by attention", "values in 2 bits"),
    ("QAQ: keys need more bits than values", "4 and 2 bits", "2 and 4 bits"),
    ("MiKV: 3 bits before 2", "mikv(bits=3)@20%", "mikv(bits=2)@20%"),
    ("MiKV: balanced channels at 2 bits", "mikv(bits=2)@20%", "mikv(bits=2, balance=False)@20%"),
    ("MiKV: 2 bits before nothing", "mikv(bits=2, balance=False)@20%", "h2o@20%"),
    ("KVQuant: fitted levels before even ones, 3 bits", "kvquant(sparsity=0)", "3 bits in even steps"),
    ("AQUA-KV: predictors before none", "aquakv", "without predictors"),
    ("AQUA-KV without predictors (HIGGS) before KIVI at 2 bits", "without predictors", "kivi(bits=2)"),
    ("RotateKV: rotated before not", "rotatekv(bits=2, group=32)", "not rotated"),
    (
        "TurboQuant: all bits for the codes before one for the sketch",
        "turboquant(bits=3)",
        "turboquant(bits=3, qjl=True)",
    ),
    ("XQuant before per-token rounding at 4 bits", "xquant", "quantized_pruning(residual=0)@100%"),
    ("CalibQuant: calibrated logits before none, 1 bit", "visual_1bit", "visual_1bit(lowered=0)"),
    ("the same, 2 bits", "visual_1bit(bits=2)", "visual_1bit(bits=2, lowered=0)"),
)


def main() -> None:
    """Prints the tables, and puts them between the marks of a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", default=None, help="source of texts, as in kvbudget bench")
    parser.add_argument("--context", type=int, default=1024, help="tokens in the cache; twice as many for drafts")
    parser.add_argument("--continuation", type=int, default=96)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--markdown", type=Path, help="a page with <!-- orderings --> and <!-- drafts --> to fill")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = kvbudget.load(arguments.model)
    source = arguments.text or default_source()
    texts = passages(tokenizer, 2 * arguments.context + arguments.continuation, arguments.texts, source=source)
    with tempfile.TemporaryDirectory() as folder:
        known = variants(model, Path(folder))
        found = codes(model, known, texts, arguments.context, arguments.continuation)
    both = {
        "orderings": lambda: judged(found),
        "drafts": lambda: drafts(model, [ids[: 2 * arguments.context] for ids in texts]),
    }
    for name, made in both.items():
        table = made()
        print(table, flush=True)
        if arguments.markdown:
            insert(arguments.markdown, name, table)


def codes(
    model: PreTrainedModel, known: dict[str, Policy], texts: Sequence[Tensor], context: int, continuation: int
) -> dict[str, list[tuple[float, float]]]:
    """True bits and KL of every policy that the claims name, text by text."""
    found: dict[str, list[tuple[float, float]]] = {}
    names = dict.fromkeys(name for _, *both in CLAIMS for name in both)
    for ids in texts:
        recording, following = record(model, ids[None, :context]), ids[None, context : context + continuation]
        whole = replay(recording, kvbudget.KVCache(model, "full"))
        full = continuation_logits(model, whole, recording.logits, following)
        for name in names:
            text, _, budget = name.partition("@")
            try:
                bits, fidelity = measure(
                    model, recording, known.get(name) or parse(text), following, full, budget or None
                )
            except PolicyError as error:
                print(f"left out: {name} ({error})", flush=True)
                continue
            found.setdefault(name, []).append((bits, fidelity.kl_mean))
    return found


def judged(found: dict[str, list[tuple[float, float]]]) -> str:
    """A Markdown row per claim: bits, KL and their ratio, paired over the texts."""
    rows = ["| claim | first: bits, KL | second: bits, KL | ratio of KL | as measured |", "|---|---|---|---|---|"]
    for claim, *both in CLAIMS:
        if all(name in found for name in both):
            logs = [[math.log(kl) for _, kl in found[name]] for name in both]
            cells = [
                f"{name}: {mean(b for b, _ in found[name]):.2f}, {math.exp(mean(x)):.2g}"
                for name, x in zip(both, logs, strict=True)
            ]
            verdict, gap = compare(*logs)
            factor = f"{math.exp(gap.mean):.2f} [{math.exp(gap.low):.2f}, {math.exp(gap.high):.2f}]"
            holds = {"lower": "yes", "higher": "no, the other way round"}.get(verdict, verdict)
            rows.append(f"| {claim} | {' | '.join(cells)} | {factor} | {holds} |")
    return "\n".join(rows)


@torch.inference_mode()
def drafts(model: PreTrainedModel, texts: Sequence[Tensor], new: int = 64) -> str:
    """Acceptance of QuantSpec's drafts, and of drafts out of as few entries as take the bytes of its upper bits."""
    counts: dict[str, list[tuple[int, int]]] = {}
    for ids in texts:
        cache = kvbudget.KVCache(model, "quantspec")
        done = speculate(model, cache, ids[None], new, DRAFTED)
        key = cache.enforcer.layers[0].main[0].key
        share = (true_bits(cache, 16) - 4 * key.coded[0] / key.lengths[0]) / 16
        counts.setdefault("all entries, the upper four bits", []).append((done.drafted, done.accepted))
        for policy in ("snapkv", "streaming_llm"):
            sparse = kvbudget.KVCache(model, policy, round(share * len(ids)))
            name = f"`{policy}`, {share:.0%} of the entries in full precision"
            counts.setdefault(name, []).append(drafted(model, sparse, ids, done.token_ids))
    rows = ["| what drafts read | drafted | accepted | per text |", "|---|---|---|---|"]
    for name, found in counts.items():
        tried, kept = (sum(column) for column in zip(*found, strict=True))
        rows.append(f"| {name} | {tried} | {kept / tried:.1%} | {', '.join(f'{b / a:.0%}' for a, b in found)} |")
    return "\n".join(rows)


def drafted(model: PreTrainedModel, cache: kvbudget.KVCache, ids: Tensor, answer: Sequence[int]) -> tuple[int, int]:
    """How many tokens a cache drafts of an answer that is known, as `speculate` would, and how many of them belong to it."""
    cache.prefill(model, ids[None])
    at = tried = kept = 0
    while at + 1 < len(answer):
        fork, guess = cache.fork(), [answer[at]]
        for _ in range(min(DRAFTED, len(answer) - at - 2)):
            logits = model(torch.tensor([guess[-1:]]), past_key_values=fork).logits
            guess.append(int(logits[0, -1].argmax()))
        pairs = enumerate(zip(guess[1:], answer[at + 1 :], strict=False))
        agreed = next((i for i, (mine, its) in pairs if mine != its), len(guess) - 1)
        tried, kept = tried + len(guess) - 1, kept + agreed
        model(torch.tensor([answer[at : at + agreed + 1]]), past_key_values=cache)
        at += agreed + 1
    return tried, kept


if __name__ == "__main__":
    main()
