"""RazorAttention: calibration against whole attention maps, compensation against brute force, and who pays for what."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from brute import chunks, kept_positions, run
from induction import induction_model
from torch import Tensor
from transformers import PreTrainedModel

from kvbudget.cache import KVCache
from kvbudget.calibrate import calibrate
from kvbudget.errors import BudgetError, KVBudgetError, PolicyError
from kvbudget.kernels.reference import merge
from kvbudget.layer import AttentionCall, LayerCache
from kvbudget.methods import parse
from kvbudget.methods.razor_attention import RazorAttention
from kvbudget.models import fingerprint
from kvbudget.policy.allocators.pinned import strongest
from kvbudget.policy.artifact import Artifact, default_path
from kvbudget.policy.base import Evicted
from kvbudget.policy.destinations.compensate import Compensate
from kvbudget.segments.base import AttendContext
from tiny import left_padded, random_text, tiny_model


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path))
    return tmp_path


def pinned(model: PreTrainedModel, heads: Sequence[Sequence[int]], **options: object) -> RazorAttention:
    """The method with these heads as retrieval heads, by an artifact that says so."""
    scores = torch.full((len(heads), model.config.num_key_value_heads), 0.1)
    for layer, row in enumerate(heads):
        scores[layer, list(row)] = 0.9
    number = sum(map(len, heads))
    Artifact("razor_attention", fingerprint(model), {"echo": scores, "induction": scores}, {}).save()
    return RazorAttention(echo=0.0, induction=number / scores.numel(), **options)


# -- calibration -------------------------------------------------------------------------------------------------------


def attention_maps(model: PreTrainedModel, ids: Tensor) -> Sequence[Tensor]:
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        return model(ids, output_attentions=True).attentions


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_scores_are_means_over_the_diagonals(name):
    block, repeats = 23, 3
    model = tiny_model(name)
    path = calibrate("razor_attention", model, block=block, repeats=repeats, seed=5)
    tensors = Artifact.load("razor_attention", fingerprint(model), path).tensors
    tokens = torch.randint(model.config.vocab_size, (block,), generator=torch.Generator().manual_seed(5))
    ids = torch.cat([tokens[-1:], tokens.repeat(repeats)])[None]  # tiny models have no token for the beginning
    for layer, weights in enumerate(attention_maps(model, ids)):
        if name == "gemma2" and layer % 2 == 0:  # a sliding layer
            assert bool((tensors["echo"][layer] == -1).all())
            continue
        echo, induction = [], []
        for i in range(1, ids.shape[1]):
            for j in range(i - block, 0, -block):
                echo.append(weights[0, :, i, j])
                induction.append(weights[0, :, i, j + 1])
        for scores, found in ((echo, tensors["echo"]), (induction, tensors["induction"])):
            expected = torch.stack(scores).mean(0).unflatten(0, (found.shape[1], -1)).amax(1)
            torch.testing.assert_close(found[layer], expected, atol=1e-6, rtol=1e-4)


def test_an_induction_head_and_an_echo_head_are_found():
    model = induction_model()
    artifact = Artifact.load("razor_attention", fingerprint(model), calibrate("razor_attention", model, block=60))
    echo, induction = artifact.tensors["echo"], artifact.tensors["induction"]
    assert artifact.parameters == {"block": 60, "repeats": 4, "seed": 0}
    assert induction.argmax() == 2 and induction[1, 0] > 0.3 > 10 * induction[0].max()
    assert echo.argmax() == 3 and echo[1, 1] > 0.15 > 10 * echo[0].max()
    cache = KVCache(model, "razor_attention", 240)
    run(model, cache, random_text(300), [250] + [1] * 50)
    assert [[len(row) for row in kept_positions(cache, layer)] for layer in (0, 1)][1] == [300, 300]


def test_about_15_percent_of_the_heads():
    scores = torch.rand(2, 30, 3, generator=torch.Generator().manual_seed(0))
    chosen = strongest(scores[0], 0.01) | strongest(scores[1], 0.14)
    assert 0.14 <= chosen.float().mean() <= 0.16
    top = strongest(scores[1], 0.14)
    assert scores[1][top].min() > scores[1][~top].max() and int(top.sum()) == 13
    scores[:, 10:] = -1.0  # layers without such heads are not counted
    assert int(strongest(scores[1], 0.14).sum()) == 4 and not bool(strongest(scores[1], 0.0).any())


def test_artifacts_are_for_one_model_and_method(tmp_path):
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    with pytest.raises(PolicyError, match=r"needs a calibration.*kvbudget calibrate razor_attention --model"):
        KVCache(model, "razor_attention", 64)
    with pytest.raises(PolicyError, match=r"nowhere.safetensors does not exist.*kvbudget calibrate razor_attention"):
        KVCache(model, "razor_attention(heads='nowhere.safetensors')", 64)
    path = calibrate("razor_attention", model, tmp_path / "heads" / "llama.safetensors", block=20)
    assert [file.name for file in path.parent.iterdir()] == ["llama.safetensors"]
    assert KVCache(model, RazorAttention(heads=str(path)), "80%").parts.heads.heads
    with pytest.raises(PolicyError, match=r"another model.*kvbudget calibrate razor_attention"):
        KVCache(other, RazorAttention(heads=str(path)), 64)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(PolicyError, match=r"does not match its checksum.*kvbudget calibrate razor_attention"):
        KVCache(model, RazorAttention(heads=str(path)), 64)
    with pytest.raises(PolicyError, match="is a folder"):
        calibrate("razor_attention", model, tmp_path, block=20)
    Artifact("duo_attention", fingerprint(model), {}, {}).save(path)
    with pytest.raises(PolicyError, match="calibration of duo_attention, not of razor_attention"):
        KVCache(model, RazorAttention(heads=str(path)), 64)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(PolicyError, match="cannot be read"):
        KVCache(model, RazorAttention(heads=str(path)), 64)
    with pytest.raises(KVBudgetError, match="cannot be written"):
        Artifact("razor_attention", "0", {}, {}).save(path / "below a file")


def test_the_default_place_and_the_parameters_of_a_calibration(cache_folder):
    model = tiny_model("llama")
    path = calibrate("razor_attention", model, repeats=3)
    assert path == default_path("razor_attention", fingerprint(model)) and cache_folder in path.parents
    with pytest.raises(PolicyError, match="did you mean 'razor_attention'"):
        calibrate("razor_atention", model)
    with pytest.raises(PolicyError, match="no parameter 'repeat'; did you mean 'repeats'"):
        calibrate("razor_attention", model, repeat=3)
    with pytest.raises(PolicyError, match=r"block=600 .* 1024 positions; give 2 to 255"):
        calibrate("razor_attention", model, block=600)
    with pytest.raises(PolicyError, match="repeats=1"):
        calibrate("razor_attention", model, repeats=1)


def test_loaded_heads_are_not_part_of_the_text():
    model = tiny_model("llama")
    cache = KVCache(model, pinned(model, [[1], []], sinks=2), 100)
    assert parse(str(cache.policy)) == cache.policy and "sinks=2" in str(cache.policy)
    assert "retrieval" not in str(cache.policy) and cache.parts.heads.heads == ((1,), ())
    with pytest.raises(PolicyError, match="no parameter 'retrieval'"):
        parse("razor_attention(retrieval=((1,),))")


# -- compensation ------------------------------------------------------------------------------------------------------


def attended(layer: LayerCache, query: Tensor) -> Tensor:
    rows = query.reshape(layer.num_rows, -1, query.shape[-1])
    return merge([segment.attend(rows, AttendContext(scale=0.5)) for segment in layer.segments]).out


def dropped(layer: LayerCache, cells: slice) -> Evicted:
    """Evicts these cells of all rows."""
    (segment,) = layer.main
    gone = torch.zeros(layer.num_rows, segment.longest, dtype=torch.bool)
    gone[:, cells] = True
    key, value, meta, counts = segment.gather(gone)
    layer.evict(~gone)
    return Evicted(key, value, meta["position"], torch.zeros(len(key)), counts)


def test_equal_dropped_entries_are_compensated_exactly():
    layer = LayerCache(0, 2)
    key, value = torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16)
    key[:, :, 5:40], value[:, :, 5:40] = key[:, :, 5:6], value[:, :, 5:6]
    layer.append(key, value, None)
    query = torch.randn(1, 4, 3, 16)
    full = attended(layer, query)
    for cells in (slice(5, 20), slice(5, 8), slice(5, 22)):
        Compensate().receive(layer, dropped(layer, cells))
        torch.testing.assert_close(attended(layer, query), full, atol=1e-5, rtol=1e-5)
        layer.check_integrity()
    (front,) = layer.front
    assert front.lengths == [1, 1] and front.meta.columns["count"].tolist() == [35.0, 35.0]
    front.meta.columns["count"].fill_(1.0)
    assert (attended(layer, query) - full).abs().max() > 0.05, "without the count the mean entry is one among others"
    layer.front = []
    assert (attended(layer, query) - full).abs().max() > 0.05


def test_the_mean_runs_over_all_evictions_in_full_precision():
    layer = LayerCache(0, 1)
    layer.append(torch.randn(1, 1, 4000, 16).bfloat16(), torch.randn(1, 1, 4000, 16).bfloat16(), None)
    keys, values = layer.main[0].keys()[0].double(), layer.main[0].values()[0].double()
    for _ in range(250):
        Compensate().receive(layer, dropped(layer, slice(0, 16)))
    (front,) = layer.front
    torch.testing.assert_close(front.keys()[0, 0].double(), keys.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(front.values()[0, 0].double(), values.mean(0), atol=1e-5, rtol=0)


class Oracle:
    """All keys and values of one sequence; attention over kept ones, the mean of all others, and the call's own."""

    def __init__(self, model: PreTrainedModel, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def feed(self, ids: Tensor, sizes: Sequence[int]) -> None:
        attend = self.cache.attend

        def checked(index: int, call: AttentionCall, *rest: object) -> Tensor:
            for store, new in ((self.keys, call.key[0]), (self.values, call.value[0])):
                store[index] = torch.cat([store[index], new], dim=1) if index in store else new.clone()
            expected = self.answer(index, call)
            out = attend(index, call, *rest)
            torch.testing.assert_close(out[0].double(), expected, atol=5e-5, rtol=1e-4)
            return out

        self.cache.attend = checked  # type: ignore[method-assign]
        begin = 0
        for size in sizes:
            with torch.inference_mode():
                self.model(ids[:, begin : begin + size], past_key_values=self.cache)
            begin += size
            self.cache.check_integrity()
        del self.cache.attend

    def answer(self, index: int, call: AttentionCall) -> Tensor:
        new = call.key.shape[2]
        seen = self.keys[index].shape[1] - new
        empty: list[list[int]] = [[] for _ in self.keys[index]]
        held = kept_positions(self.cache, index) if seen else empty
        outs = []
        for h, query in enumerate(call.query[0].double().unflatten(0, (len(held), -1))):
            key, value = self.keys[index][h].double(), self.values[index][h].double()
            own = [*held[h], *range(seen, seen + new)]
            gone = sorted(set(range(seen)) - set(held[h]))
            logits = query @ key[own].T * call.scale
            late = torch.tensor(own) > seen + torch.arange(new)[:, None]
            logits, values = logits.masked_fill(late, float("-inf")), value[own]
            if gone:
                mean = query @ key[gone].mean(0)[:, None] * call.scale + torch.tensor(float(len(gone))).log()
                logits, values = torch.cat([logits, mean], dim=-1), torch.cat([values, value[gone].mean(0)[None]])
            outs.append(torch.softmax(logits, dim=-1) @ values)
        return torch.cat(outs)


@pytest.mark.parametrize("sizes", [[150] + [1] * 40, chunks(150, 40) + [1] * 20, [7] * 15 + [3] * 10], ids=len)
@pytest.mark.parametrize("heads", [[[1], []], [[], [0, 1]], [[], []]], ids=str)
def test_attention_is_that_over_kept_entries_and_the_mean(heads, sizes):
    model = tiny_model("llama")
    cache = KVCache(model, pinned(model, heads), "70%", max_length=sum(sizes))
    Oracle(model, cache).feed(random_text(sum(sizes)), sizes)
    seen = sum(sizes)
    for layer, row in enumerate(heads):
        for h, held in enumerate(kept_positions(cache, layer)):
            if h in row:
                assert held == list(range(seen))
            else:
                assert len(held) < seen and held[:4] == [0, 1, 2, 3]
                assert held[4:] == list(range(seen - len(held) + 4, seen)), "sinks and a recent window"


def test_any_scorer_may_choose_what_the_other_heads_keep():
    model = tiny_model("llama")
    policy = f"snapkv(window=8)+{pinned(model, [[1], []])}"
    Oracle(model, cache := KVCache(model, policy, 100)).feed(random_text(140), [120] + [1] * 20)
    assert kept_positions(cache, 0)[1] == list(range(140)) and len(kept_positions(cache, 0)[0]) < 100


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [110, "55%"])
def test_the_total_is_the_budget(budget):
    model, ids = tiny_model("llama", num_key_value_heads=4), random_text(200)
    cache = KVCache(model, pinned(model, [[1, 2], [3]]), budget, max_length=200, when="every(1)")
    for end in range(40, 201, 20):
        with torch.inference_mode():
            model(ids[:, end - 20 if end > 40 else 0 : end], past_key_values=cache)
        cache.check_integrity()
        held = [sum(store.evictable()[0]) for store in cache.enforcer.layers]
        total = 8 * 110
        assert sum(held) == min(total, 8 * end)
    rows = [len(row) for layer in (0, 1) for row in kept_positions(cache, layer)]
    assert [rows[1], rows[2], rows[7]] == [200] * 3
    window = [rows[i] for i in (0, 3, 4, 5, 6)]
    assert sum(window) == total - 600 and max(window) - min(window) <= 1


@pytest.mark.parametrize("rows", [1, 3])
def test_byte_budgets_hold_at_every_step(rows):
    model = tiny_model("llama", num_key_value_heads=4)
    texts = [random_text(length, seed=length) for length in (150, 40, 90)][:rows]
    ids, mask = left_padded(texts)
    cache = KVCache(model, pinned(model, [[0], [2]]), f"{rows * 120}KiB")
    used = []
    for step in range(61):
        new = ids if not step else random_text(1, rows, seed=step)
        mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1) if step else mask
        where = (mask.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
        with torch.inference_mode():
            model(new, attention_mask=mask, position_ids=where, past_key_values=cache)
        cache.check_integrity()
        used.append(cache.nbytes / cache.budget.amount)
        for b in range(rows):
            assert len(kept_positions(cache, 0, b)[0]) == len(kept_positions(cache, 1, b)[2]) == cache.seen[b]
    assert cache.enforcer.evictions > 0 and max(used) > 0.85


@pytest.mark.parametrize(("kind", "unit"), [("tokens", ""), ("bytes", "B")])
def test_the_smallest_budget_for_the_pinned_heads_is_named(kind, unit):
    model, ids = tiny_model("llama"), random_text(120)
    recipe = pinned(model, [[1], [0]])
    cache = KVCache(model, recipe, "20" if kind == "tokens" else "20KiB")
    with pytest.raises(BudgetError, match=r"keeps 2 of 4 KV heads whole, and 120 tokens .* give at least") as error:
        model(ids, past_key_values=cache)
    assert cache.nbytes == 0
    smallest = int(re.search(r"at least (\d+)", str(error.value))[1])
    cache = KVCache(model, recipe, f"{smallest}{unit}")
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    cache.check_integrity()
    window, whole, also_whole, other = [len(row) for layer in (0, 1) for row in kept_positions(cache, layer)]
    assert whole == also_whole == 120 and {window, other} <= {5, 6}, "sinks and one entry, or what the rounding adds"
    less = smallest - (1 if kind == "tokens" else 2)  # bytes are named with one to spare for rounding
    cache = KVCache(model, recipe, f"{less}{unit}")
    with pytest.raises(BudgetError):
        model(ids, past_key_values=cache)
    with pytest.raises(BudgetError, match="whole"):
        KVCache(model, recipe, f"{less}{unit}", max_length=120)


def test_a_fraction_below_the_pinned_share_is_refused():
    model = tiny_model("llama")
    recipe = pinned(model, [[1], [0]])
    with pytest.raises(BudgetError, match=r"2 of 4 KV heads whole.* give more than 50.0%"):
        KVCache(model, recipe, "50%")
    cache = KVCache(model, recipe, "60%")
    run(model, cache, random_text(100), [2, 3, 1, 60, *[1] * 34])  # short texts are held by their floors
    assert sum(sum(store.evictable()[0]) for store in cache.enforcer.layers) <= 0.6 * 400


def test_the_papers_window_needs_no_budget():
    model, ids = tiny_model("llama"), random_text(240)
    recipe = pinned(model, [[1], []], window=30, compression=4.0)
    cache = KVCache(model, recipe, when="every(1)")
    Oracle(model, cache).feed(ids, [100, *[1] * 40, 100])
    assert [[len(row) for row in kept_positions(cache, layer)] for layer in (0, 1)] == [[64, 240], [64, 64]]
    short = KVCache(model, recipe)
    full = run(model, KVCache(model, "full"), ids[:, :34], [34])
    torch.testing.assert_close(run(model, short, ids[:, :34], [20] + [1] * 14), full, atol=1e-4, rtol=0)
    assert short.enforcer.evictions == 0 and not short.enforcer.layers[0].front
    with pytest.raises(BudgetError, match="needs a budget"):
        KVCache(model, pinned(model, [[1], []]))


def test_a_bounded_window_holds_inside_a_large_budget():
    model = tiny_model("llama")
    for budget in (1000, "1GiB"):
        cache = KVCache(model, pinned(model, [[1], []], window=30, compression=10.0), budget)
        run(model, cache, random_text(200), [150] + [1] * 50)
        assert 28 <= len(kept_positions(cache, 0)[0]) <= 34


def test_everything_fits():
    model, ids = tiny_model("llama"), random_text(90)
    full = run(model, KVCache(model, "full"), ids, [90])
    for budget in (90, "1MiB", "100%"):
        cache = KVCache(model, pinned(model, [[1], []]), budget)
        torch.testing.assert_close(run(model, cache, ids, [60, 10, *[1] * 20]), full, atol=1e-4, rtol=0)
        assert cache.enforcer.evictions == 0


# -- forks, rows, types ------------------------------------------------------------------------------------------------


def test_forks_and_reordered_rows_go_on_by_themselves():
    model = tiny_model("llama")
    recipe = pinned(model, [[1], []])
    text, endings = random_text(100), [random_text(20, seed=seed) for seed in (1, 2)]
    alone = [
        run(model, KVCache(model, recipe, 80), torch.cat([text, ending], dim=1), [100] + [1] * 20)[:, 100:]
        for ending in endings
    ]
    cache = KVCache(model, recipe, 80)
    run(model, cache, text, [100])
    for fork, ending, expected in zip([cache.fork(), cache.fork()], endings, alone, strict=True):
        torch.testing.assert_close(run(model, fork, ending, [1] * 20), expected, atol=1e-5, rtol=0)
    cache.batch_repeat_interleave(2)
    both = run(model, cache, torch.cat(endings), [1] * 20)
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-5, rtol=0)


def test_padded_rows_equal_their_single_runs():
    model = tiny_model("llama")
    recipe = pinned(model, [[1], []])
    texts = [random_text(length, seed=length) for length in (130, 45, 90)]
    steps = [random_text(15, seed=seed) for seed in range(3)]
    ids, mask = left_padded(texts)
    cache = KVCache(model, recipe, 100)
    rows = []
    for step in range(16):
        new = ids if not step else torch.cat([ending[:, step - 1 : step] for ending in steps])
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1) if step else mask
        where = (mask.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
        with torch.inference_mode():
            rows.append(model(new, attention_mask=mask, position_ids=where, past_key_values=cache).logits[:, -1:])
        cache.check_integrity()
    assert cache.seen == [145, 60, 105]
    for b, (text, ending) in enumerate(zip(texts, steps, strict=True)):
        single = KVCache(model, recipe, 100)
        expected = run(model, single, torch.cat([text, ending], dim=1), [text.shape[1], *[1] * 15])[:, -16:]
        torch.testing.assert_close(torch.cat([row[b : b + 1] for row in rows], dim=1), expected, atol=1e-4, rtol=0)
        for layer in range(2):
            assert kept_positions(cache, layer, b) == kept_positions(single, layer)


def test_half_precision_models_keep_means_in_float32():
    model = tiny_model("llama", dtype=torch.bfloat16)
    cache = KVCache(model, pinned(model, [[1], []]), "100KiB")
    logits = run(model, cache, random_text(900), [600, 200, *[1] * 100])
    assert bool(logits.isfinite().all())
    (front,) = cache.enforcer.layers[1].front
    assert front.keys().dtype == torch.float32 and cache.report().parts["counts"] == 2 * 4 + 4
