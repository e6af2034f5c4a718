"""A policy is a value: it prints as one line, parses back, goes through YAML, compares, hashes and refuses nonsense."""

from dataclasses import FrozenInstanceError, fields, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvbudget import KVCache
from kvbudget.errors import KVBudgetError, PolicyError
from kvbudget.methods import parse, registry
from kvbudget.policy.base import Parts, Recipe
from kvbudget.policy.policy import Policy, build, parse_terms
from tiny import random_text, tiny_model

METHODS = registry()
ALL = pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)


def values_of(kind: type[Recipe], name: str) -> st.SearchStrategy[Any]:
    """Values of the type that a field of a recipe declares."""
    hint, default = get_type_hints(kind)[name], kind.parameters()[name]
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(0, 512)
    if isinstance(default, float):
        return st.floats(0, 1e6) | st.floats(0, 1)
    if isinstance(default, str):
        return st.text(max_size=12)
    return st.lists(st.integers(0, 99), max_size=4).map(tuple)


@st.composite
def recipes(draw: st.DrawFn, kinds: tuple[type[Recipe], ...] = tuple(METHODS.values())) -> Recipe:
    """A recipe of the registry with some parameters drawn, kept at their defaults where the recipe refuses them."""
    kind = draw(st.sampled_from(kinds))
    chosen = {name: draw(values_of(kind, name)) for name in kind.parameters() if draw(st.booleans())}
    try:
        return build(METHODS, kind.name, chosen)
    except PolicyError:
        return kind()


def parses(policy: Policy) -> bool:
    try:
        policy.parts()
    except PolicyError:
        return False
    return True


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Recipes that go together."""
    policy = Policy((draw(recipes()),))
    for recipe in draw(st.lists(recipes(), max_size=3)):
        longer = Policy((*policy.recipes, recipe))
        policy = longer if parses(longer) else policy
    return policy


@given(policies())
def test_text_and_back(policy: Policy) -> None:
    terms = parse_terms(str(policy))
    again = Policy(tuple(build(METHODS, name, parameters) for name, parameters in terms))
    assert again == policy and hash(again) == hash(policy) and str(again) == str(policy)
    assert "\n" not in str(policy)


@given(policies())
def test_yaml_and_back(tmp_path_factory: pytest.TempPathFactory, policy: Policy) -> None:
    path = tmp_path_factory.mktemp("policies") / "policy.yaml"
    policy.to_yaml(path)
    assert parse(path) == parse(str(path)) == policy
    assert isinstance(parse(path).parts(), Parts)


@given(recipes(), recipes())
def test_equal_policies_and_no_others_print_alike(one: Recipe, other: Recipe) -> None:
    assert (Policy((one,)) == Policy((other,))) == (str(one) == str(other))


@ALL
def test_a_recipe_is_a_frozen_documented_value(kind: type[Recipe]) -> None:
    recipe = kind()
    assert is_dataclass(kind) and hash(recipe) == hash(kind()) and recipe == kind()
    assert str(recipe) == kind.name
    for field in fields(recipe):  # type: ignore[arg-type]
        with pytest.raises(FrozenInstanceError):
            setattr(recipe, field.name, None)
    text = kind.__doc__ or ""
    assert kind.role and kind.phase and kind.paper
    assert all(name in text for name in kind.parameters()), f"{kind.name} does not document all of its parameters"
    assert "Paper:" in text or "none" in kind.paper or "control" in kind.role, f"{kind.name} does not cite its paper"


def test_names_and_aliases_are_one_table() -> None:
    owners: dict[str, str] = {}
    for name, kind in METHODS.items():
        assert name == kind.name
        for alias in (kind.name, *kind.aliases):
            assert alias.isidentifier() and alias == alias.lower(), f"{alias!r} cannot be written in a policy"
            assert alias not in owners, f"{alias!r} names {owners.get(alias)} and {name}"
            owners[alias] = name
            assert parse(alias).names[0] == name if parses(Policy((kind(),))) else True
    assert owners["pyramid"] == "pyramidkv"


def test_parts_compare_like_the_text() -> None:
    assert parse("snapkv ( window = 64 )+adakv") == parse("snapkv(window=64) + adakv()")
    assert parse("snapkv") != parse("snapkv(window=33)")
    assert parse("snapkv+adakv") != parse("adakv+snapkv"), "the order is part of the text"
    assert len({parse("snapkv"), parse("snapkv(window=32)"), parse("snapkv(window=64)")}) == 2
    assert str(parse("snapkv(pooling=max)")) == "snapkv(pooling='max')"
    assert parse("pyramidkv(beta=4)") == parse("pyramidkv(beta=4.0)")
    assert str(parse("pyramidkv(beta=4)")) == str(parse("pyramidkv(beta=4.0)"))
    policy = parse("snapkv")
    assert parse(policy) is policy and parse(policy.recipes[0]) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapkw", r"unknown method 'snapkw'; did you mean 'snapkv'\?"),
        ("snapkv+pyramidd", r"unknown method 'pyramidd'; did you mean 'pyramid'\?"),
        ("snapkv+fairkv", r"unknown method 'fairkv': it places heads on devices.* plan --tensor-parallel 2"),
        ("nosuch", r"unknown method 'nosuch'; known: a2ats, .*snapkv"),
        ("snapkv+kvtc", r"unknown method 'kvtc': it codes saved caches.* cache.save\(path, codec='kvtc'\)"),
        ("zzzzzz", r"unknown method 'zzzzzz'; known: a2ats, .*snapkv"),
        ("snapkv(windw=3)", r"snapkv has no parameter 'windw'; did you mean 'window'\?"),
        ("full(window=3)", r"full takes no parameters, got window=3"),
        ("snapkv(window=big)", r"snapkv: window='big' must be a whole number like the default 32"),
        ("snapkv(window=1.5)", r"snapkv: window=1.5 must be a whole number"),
        ("snapkv(window=True)", r"snapkv: window=True must be a whole number"),
        ("snapkv(window=-1)", r"snapkv: window=-1 must be a number from 0 on"),
        ("snapkv(window=None)", r"snapkv: window=None must be a whole number"),
        ("snapkv(pooling=maxx)", r"snapkv: pooling='maxx' is not one of its values; did you mean 'max'\?"),
        ("snapkv(pooling=3)", r"snapkv: pooling=3 must be a word like the default 'avg'"),
        ("adakv(normalize=1)", r"adakv: normalize=1 must be True or False"),
        ("adakv(safeguard=1e999)", r"adakv: safeguard=inf must be a number from 0 on"),
        ("pyramidkv(beta='x')", r"pyramidkv: beta='x' must be a number like the default 20.0"),
        ("snapkv(window={1: 2})", r"snapkv: window=\{1: 2\} must be a number, a word"),
        ("snapkv(window=1+1j)", r"snapkv: window=\(1\+1j\) must be a number, a word"),
        ("snapkv(window=0)", r"window=0 leaves no query that could judge entries; give at least 1"),
        ("visual_1bit(lowered=much)", r"visual_1bit: lowered='much' must be a number, or None"),
        ("visual_1bit(lowered=True)", r"visual_1bit: lowered=True must be a number, or None"),
        ("fair(cuts=(1.5,))", r"fair: cuts=\(1.5,\) must be a list of whole numbers"),
        ("kivi(group=0)", r"a group of 0 entries holds nothing to quantize"),
        ("snapkv(window={})", r"snapkv: window=\{\} must be a number, a word"),
        ("pyramidkv(beta=0.5)", r"beta=0.5 must be at least 1"),
        ("kivi(bits=5)", r"bits=5 cannot be packed; give one of 1, 2, 3, 4, 8"),
        ("snapkv+knorm", r"snapkv and knorm both decide the scorer; use one of them"),
        ("kivi+kivi(bits=2)", r"kivi and kivi both decide the codec"),
        ("pyramid+cake", r"pyramidkv and cake both decide the layers"),
    ],
)
def test_nonsense_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        parse(text)


@ALL
def test_numbers_out_of_range_are_refused_by_name(kind: type[Recipe]) -> None:
    numbers = [key for key, default in kind.parameters().items() if not isinstance(default, (bool, str))]
    for key, value in product(numbers, (-1, float("nan"), float("inf"), 2**31, 10**400)):
        given = (value,) if isinstance(kind.parameters()[key], tuple) else value
        with pytest.raises(PolicyError) as error:
            build(METHODS, kind.name, {key: given})
        text = str(error.value)
        assert text.startswith(f"{kind.name}: {key}={given!r}") and "\n" not in text
        assert "a number from 0 on" in text or "give at most 2147483647" in text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "+",
        "snapkv+",
        "+snapkv",
        "snapkv*2",
        "snapkv-adakv",
        "snapkv(64)",
        "snapkv(window=1, window=2)",
        "snapkv(**{'window': 4})",
        "snapkv(window=print())",
        "snapkv(window=[x for x in y])",
        "snapkv.evil",
        "(lambda: 1)",
        "a;b",
        "snapkv\nadakv",
        "snap\0kv",
        "snapkv(" * 500,
        "(" * 100_000,
        "snapkv" + "+(snapkv" * 20_000,
    ],
)
def test_what_is_no_list_of_methods_cannot_be_read(text: str) -> None:
    with pytest.raises(PolicyError, match="cannot be read; write methods joined by") as error:
        parse(text)
    assert len(str(error.value)) < 400


def test_long_sums_are_only_long() -> None:
    assert len(parse_terms("+".join(["full"] * 300))) == 300


def test_what_is_no_policy_is_refused() -> None:
    for thing in (None, 3, ["snapkv"], object):
        with pytest.raises(PolicyError, match="neither a Policy, a recipe, a text nor a YAML file"):
            parse(thing)  # type: ignore[arg-type]


def test_a_recipe_made_by_hand_is_checked_as_text_is() -> None:
    with pytest.raises(PolicyError, match="pooling='maxx' is not one of its values"):
        parse(METHODS["snapkv"](pooling="maxx"))
    with pytest.raises(PolicyError, match="window=-4 must be a number from 0 on"):
        Policy((METHODS["snapkv"](window=-4),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no list under 'policy:'"),
        ("snapkv", "no list under 'policy:'"),
        ("polcy: [snapkv]", "no field 'polcy'"),
        ("policy: []", "no list under 'policy:'"),
        ("policy: {snapkv: {window: 8}}", "no list under 'policy:'"),
        ("policy: [snapkv, 3]", "3 is neither a name nor one name with parameters"),
        ("policy: [{snapkv: 8}]", "neither a name nor one name with parameters"),
        ("policy: [{snapkv: {window: 8}, adakv: {}}]", "neither a name nor one name with parameters"),
        ("policy: [{3: {}}]", "neither a name nor one name with parameters"),
        ("policy: [{snapkv: {3: 4}}]", "neither a name nor one name with parameters"),
        ("policy: [snapkw]", "did you mean 'snapkv'"),
        ("policy: [{snapkv: {window: 2026-01-01}}]", "window=.* must be a number, a word"),
        ("policy: [{snapkv: {window: {}}}]", "window=.* must be a number, a word"),
        ("policy: [snapkv, knorm]", "both decide the scorer"),
        ("policy: 'snapkv('", "cannot be read"),
        ("policy: [", "cannot be read"),
        ("policy: !!python/object/apply:os.getcwd []", "cannot be read"),
        ("\0", "cannot be read"),
    ],
)
def test_a_bad_yaml_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(PolicyError, match=message) as error:
        parse(path)
    assert "\n" not in str(error.value)


def test_yaml_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path, str(tmp_path / "absent.yml")):
        with pytest.raises(PolicyError, match="cannot be read"):
            parse(path)
    (tmp_path / "latin.yaml").write_bytes("policy: [snapkv] # \xe9".encode("latin-1"))
    with pytest.raises(PolicyError, match="cannot be read"):
        parse(tmp_path / "latin.yaml")
    with pytest.raises(PolicyError, match="cannot be written"):
        parse("snapkv").to_yaml(tmp_path / "absent" / "policy.yaml")


def test_a_yaml_file_may_hold_the_text(tmp_path: Path) -> None:
    path = tmp_path / "policy.yml"
    path.write_text("policy: snapkv(window=64)+adakv\n", encoding="utf-8")
    assert str(parse(path)) == "snapkv(window=64)+adakv"


def test_lists_become_tuples_so_that_policies_hash() -> None:
    taking = [name for name, kind in METHODS.items() if any(isinstance(d, tuple) for d in kind.parameters().values())]
    for name in taking:
        key = next(key for key, default in METHODS[name].parameters().items() if isinstance(default, tuple))
        one, other = build(METHODS, name, {key: [1, 2]}), build(METHODS, name, {key: (1, 2)})
        assert one == other and hash(one) == hash(other)


def boundary_values(kind: type[Recipe]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, default in kind.parameters().items():
        hint = get_type_hints(kind)[name]
        if get_origin(hint) is Literal:
            found += [{name: choice} for choice in get_args(hint)]
        elif isinstance(default, bool):
            found.append({name: not default})
        elif isinstance(default, int):
            found += [{name: x} for x in (0, 1, 2, 31, 10**6)]
        elif isinstance(default, float):
            found += [{name: x} for x in (0.0, 1e-9, 0.5, 1.0, 1e9)]
    return found


@ALL
def test_every_value_is_refused_or_works(kind: type[Recipe]) -> None:
    """No parameter is accepted and then fails in the middle of a forward."""
    if kind.prefill_peak == "full_prompt" or {"plan", "calibration", "driver"} & set(kind.needs):
        pytest.skip("needs more than a bare forward")
    model = tiny_model("llama")
    ids = random_text(60)
    before = "" if "scorer" in kind().parts() or "scorer" in kind().defaults() else "snapkv(window=8)+"
    for parameters in boundary_values(kind):
        try:
            text = before + str(build(METHODS, kind.name, parameters))
            cache = KVCache(model, text, 48)
        except KVBudgetError as error:
            assert "\n" not in str(error)
            continue
        with torch.no_grad():
            for begin, end in ((0, 56), (56, 57), (57, 60)):
                logits = model(ids[:, begin:end], past_key_values=cache).logits
                assert logits.isfinite().all(), f"{text} gives no numbers"
                cache.check_integrity()
        assert sum(sum(row) for store in cache.enforcer.layers for row in store.evictable()) <= 48 * 2 * 2


def test_needs_and_promises_are_those_of_all_recipes() -> None:
    policy = parse("snapkv+kivi")
    assert not policy.lossless_when_fits and parse("snapkv+adakv").lossless_when_fits
    assert policy.needs == ("queries",) and not policy.prefix_reusable
    assert parse("streaming_llm").prefix_reusable
    assert parse("knorm+adakv+pyramidkv").prefix_reusable
    assert not parse("adakv").prefix_reusable and not parse("pyramidkv").prefix_reusable, "SnapKV comes along"
    assert parse("razor_attention").prefix_reusable, "its own default scorer is recency"
    assert policy.prefill_peak == "bounded"
