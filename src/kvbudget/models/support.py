"""Which models can be served: those whose attention hands cached keys and values unseen to the attention interface."""

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvbudget.errors import UnsupportedModel
from kvbudget.models.geometry import CacheGeometry

# What the checks below cannot see, by model type.
_REFUSED: dict[str, str] = {
    "minimax": "it accepts only a cache class of its own",
    "blt": "its patch and byte models keep several caches",
    "moshi": "it decodes several audio streams with several caches",
}
# Arguments of an attention function that kvbudget's own serves; another one would change the result unnoticed.
_KNOWN_ARGUMENTS = frozenset(
    {
        "attention_mask",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "dropout",
        "is_causal",
        "max_length_k",
        "max_length_q",
        "output_attentions",
        "position_ids",
        "s_aux",
        "scaling",
        "sliding_window",
        "softcap",
    }
)


def check_supported(model: PreTrainedModel | PreTrainedConfig) -> None:
    """Raise UnsupportedModel, naming the class and the reason, unless kvbudget can serve `model`.

    Served are decoders whose attention hands what `Cache.update` returns, without looking inside, to the function
    that transformers' attention interface selects. That is read from the source of the attention classes, so it holds
    for architectures that this file has never heard of. A configuration suffices; a model is checked more precisely,
    by the modules that it really has. Refused are multi-head latent attention, encoder-decoders, encoders, layers
    that mix attention with a recurrent state, or that read another layer's keys for some of its tokens only, and models
    without attention.
    """
    config = model if isinstance(model, PreTrainedConfig) else model.config
    model_class = _model_class(config) if isinstance(model, PreTrainedConfig) else type(model)
    name = model_class.__name__ if model_class is not None else type(config).__name__
    reason = _config_flaw(config)
    if reason is None and model_class is None:
        reason = "transformers has no causal language model of this type"
    if reason is None and model_class is not None:
        if _is_encoder(config, model_class):
            reason = "its attention is bidirectional without is_decoder=True; kvbudget serves causal decoders"
        elif not model_class._can_set_attn_implementation():
            reason = "its attention does not go through transformers' attention interface"
        else:
            modules = (
                _module_classes(model_class) if isinstance(model, PreTrainedConfig) else map(type, model.modules())
            )
            classes = tuple(dict.fromkeys(modules))
            reason = _sharing_flaw(config, classes) or _attention_flaw(classes)
    if reason is not None:
        raise UnsupportedModel(f"{name} cannot be served: {reason}")


def _config_flaw(config: PreTrainedConfig) -> str | None:
    """Why the configuration alone rules the model out, or None."""
    text = config.get_text_config(decoder=True)
    for kind in {config.model_type, text.model_type} & _REFUSED.keys():
        return _REFUSED[kind]
    if config.is_encoder_decoder:
        return "it is an encoder-decoder; kvbudget serves decoders"
    if getattr(text, "is_causal", True) is False:
        return "its attention is bidirectional; kvbudget serves causal decoders"
    if getattr(text, "add_cross_attention", False) or getattr(text, "cross_attention_layers", None):
        return "it has cross-attention, whose cache is not one of generated tokens"
    try:
        layers = CacheGeometry.from_config(config).layers
    except UnsupportedModel as error:
        return str(error)
    kinds = {layer.kind for layer in layers}
    if "other" in kinds:
        return f"its layer types {sorted(set(text.layer_types))} include one whose cache is unknown"
    if not kinds & {"full", "sliding", "chunked"}:
        return "it has no attention layer, so no KV cache"
    if any(layer.recurrent and layer.num_kv_heads for layer in layers):
        return "it has layers that hold attention and a recurrent state at once"
    return None


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The causal language model class of a configuration, that of its text part where it has one of its own."""
    mapping = AutoModelForCausalLM._model_mapping
    for candidate in (config.get_text_config(decoder=True), config):
        if type(candidate) in mapping:
            found = mapping[type(candidate)]
            return found[0] if isinstance(found, tuple) else found
    return None


def _is_encoder(config: PreTrainedConfig, model_class: type) -> bool:
    """Whether a model of the BERT family is configured as an encoder; elsewhere `is_decoder` says nothing."""
    if getattr(config, "is_decoder", True):
        return False
    return "self.is_decoder = config.is_decoder" in inspect.getsource(sys.modules[model_class.__module__])


def _module_classes(model_class: type) -> list[type]:
    """The torch modules that the file of `model_class` defines."""
    module = sys.modules[model_class.__module__]
    return [
        member
        for member in vars(module).values()
        if inspect.isclass(member) and issubclass(member, torch.nn.Module) and member.__module__ == module.__name__
    ]


def _sharing_flaw(config: PreTrainedConfig, classes: tuple[type, ...]) -> str | None:
    """Why layers that read another layer's entries rule the model out, or None."""
    shares = any(layer.kind == "shared" for layer in CacheGeometry.from_config(config).layers)
    if shares and any(hasattr(module_class, "_maybe_slice_kv_shared_inputs") for module_class in classes):
        return "layers that read the keys and values of another layer are given fewer tokens than that one has stored"
    return None


@lru_cache
def _attention_flaw(classes: tuple[type, ...]) -> str | None:
    """Why one of the module classes mishandles the cache, or None; also when none of them uses a cache."""
    uses_cache = False
    for module_class in classes:
        for method in _cache_methods(module_class):
            uses_cache = True
            flaw = _method_flaw(method)
            if flaw is not None:
                return f"{module_class.__name__} {flaw}"
    return None if uses_cache else "no attention module of it updates a cache"


@lru_cache(maxsize=4096)
def _cache_methods(module_class: type) -> tuple[ast.FunctionDef, ...]:
    """The methods of a module class that call `update` on a cache, parsed."""
    methods: dict[str, Callable[..., Any]] = {}
    for owner in module_class.__mro__:
        if owner is torch.nn.Module:
            break
        for name, member in vars(owner).items():
            if inspect.isfunction(member):
                methods.setdefault(name, inspect.unwrap(member))
    parsed = []
    for method in methods.values():
        if "update" not in method.__code__.co_names:
            continue
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(method))).body
        except (OSError, TypeError, SyntaxError):  # no source: nothing vouches for this method
            continue
        if isinstance(tree, ast.FunctionDef) and _updates(tree):
            parsed.append(tree)
    return tuple(parsed)


def _updates(tree: ast.AST) -> list[ast.Call]:
    """The calls of `update` on something that is named like a cache."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "update"
        and any(word in ast.unparse(node.func.value) for word in ("past", "cache"))
    ]


def _method_flaw(tree: ast.FunctionDef) -> str | None:
    """What a method does with cached keys and values besides handing them to the attention interface, or None."""
    interfaces = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and node.value is not None
        and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node.value)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    if not interfaces:
        return "computes attention itself, past transformers' attention interface"
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in interfaces:
            unknown = sorted({word.arg for word in node.keywords if word.arg} - _KNOWN_ARGUMENTS)
            if unknown:
                return f"passes {unknown[0]!r} to the attention function, which kvbudget does not serve"
    for call in _updates(tree):
        statement = parents[call]
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        names = [
            name.id
            for target in targets
            if isinstance(target, ast.Tuple)
            for name in target.elts
            if isinstance(name, ast.Name)
        ]
        if len(names) != 2:
            return "does not take the cached keys and values as they are"
        elsewhere = _other_branches(statement, parents) | _eager_branches(tree)
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Name)
                and isinstance(node.ctx, ast.Load)
                and node.id in names
                and node.lineno > (call.end_lineno or call.lineno)
                and node not in elsewhere
                and not _handed_on(node, parents, interfaces)
            ):
                return "looks inside the cached keys or values before attention"
    return None


def _other_branches(statement: ast.AST, parents: dict[ast.AST, ast.AST]) -> set[ast.AST]:
    """Nodes that never run after `statement`: the branches not taken when its own branch was."""
    skipped: set[ast.AST] = set()
    node = statement
    while node in parents:
        parent = parents[node]
        if isinstance(parent, ast.If) and node in parent.body:
            skipped |= {inner for branch in parent.orelse for inner in ast.walk(branch)}
        node = parent
    return skipped


def _eager_branches(tree: ast.FunctionDef) -> set[ast.AST]:
    """Nodes that run only under the "eager" attention implementation, which is not selected when kvbudget serves."""
    return {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "eager" in ast.unparse(node.test) and "not" not in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }


def _handed_on(name: ast.Name, parents: dict[ast.AST, ast.AST], interfaces: set[str]) -> bool:
    """Whether the name is an argument of the attention function, or is stored untouched for another layer."""
    parent = parents[name]
    if isinstance(parent, ast.keyword):
        parent = parents[parent]
    if isinstance(parent, ast.Call):
        return isinstance(parent.func, ast.Name) and parent.func.id in interfaces
    store = parents.get(parent)
    return (
        isinstance(parent, ast.Tuple) and isinstance(store, ast.Assign) and isinstance(store.targets[0], ast.Subscript)
    )
