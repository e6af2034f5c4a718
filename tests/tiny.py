"""Tiny random causal language models, one per architecture that the library supports or refuses."""

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 128
MAX_POSITIONS = 1024
SLIDING_WINDOW = 40
PAD_TOKEN_ID = 0

# What tiny configurations share, as most of transformers spells it; architectures rename what they spell otherwise.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
    "use_cache": True,
    "pad_token_id": PAD_TOKEN_ID,
    "bos_token_id": None,
    "eos_token_id": None,
}
QUERY_KEY_PROJECTIONS = ("q_proj", "k_proj", "qkv", "c_attn", "query_key_value", "q_b_proj", "kv_b_proj")
QUERY_KEY_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")
EMBEDDINGS = ("embed", "wte", "wpe")
CONV1D_PROJECTIONS = ("c_attn", "c_fc", "c_proj")  # GPT-2 stores [inputs, outputs]
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT_NAMES: dict[str, str | None] = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "num_key_value_heads": None,
    "head_dim": None,
}
NO_GQA: dict[str, str | None] = {"num_key_value_heads": None, "head_dim": None}
MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "topk_group": 1,
    "n_group": 1,
}


@dataclass(frozen=True)
class Architecture:
    """How to configure one architecture small.

    `model_type` is the id that `AutoConfig.for_model` knows; `settings` override the common fields; `rename` maps
    common fields to the architecture's own spelling (None: it has no such field); `layer_pattern` is repeated to as
    many `layer_types` as there are layers; `refused` marks models that the library must refuse by name.
    """

    model_type: str
    settings: dict[str, Any]
    rename: dict[str, str | None]
    layer_pattern: tuple[str, ...] | None = None
    refused: bool = False


def _architecture(
    model_type: str,
    rename: dict[str, str | None] | None = None,
    layers: tuple[str, ...] | None = None,
    refused: bool = False,
    **settings: Any,
) -> Architecture:
    return Architecture(model_type, settings, rename or {}, layers, refused)


SLIDING, FULL = "sliding_attention", "full_attention"

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _architecture("llama"),
    "qwen2": _architecture("qwen2", rename={"head_dim": None}),
    "qwen2-sliding": _architecture(
        "qwen2",
        rename={"head_dim": None},
        layers=(FULL, SLIDING),
        use_sliding_window=True,
        sliding_window=SLIDING_WINDOW,
    ),
    "qwen3": _architecture("qwen3"),
    "qwen3_moe": _architecture("qwen3_moe", decoder_sparse_step=1, mlp_only_layers=[], **MOE),
    "mistral": _architecture("mistral", sliding_window=None),
    "mistral-sliding": _architecture("mistral", sliding_window=SLIDING_WINDOW),
    "mixtral": _architecture("mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "phi3": _architecture("phi3", rename={"head_dim": None}, sliding_window=None),
    "phi": _architecture("phi", rename={"head_dim": None}, partial_rotary_factor=0.5),
    "glm": _architecture("glm", partial_rotary_factor=0.5),
    "glm4": _architecture("glm4", partial_rotary_factor=0.5),
    "stablelm": _architecture("stablelm", rename={"head_dim": None}, partial_rotary_factor=0.25, qk_layernorm=True),
    "gemma2": _architecture(
        "gemma2",
        layers=(SLIDING, FULL),
        sliding_window=SLIDING_WINDOW,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=30.0,
    ),
    "gemma3": _architecture(
        "gemma3_text", layers=(SLIDING, FULL), sliding_window=SLIDING_WINDOW, query_pre_attn_scalar=24
    ),
    "gemma3n": _architecture(
        "gemma3n_text",
        layers=(SLIDING, FULL, SLIDING, FULL),
        sliding_window=SLIDING_WINDOW,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        laurel_rank=8,
    ),
    "olmo2": _architecture("olmo2", rename={"head_dim": None}),
    "cohere": _architecture("cohere", rename={"head_dim": None}, use_qk_norm=True, logit_scale=1.0),
    "cohere2": _architecture("cohere2", layers=(SLIDING, FULL), sliding_window=SLIDING_WINDOW, logit_scale=1.0),
    "granite": _architecture(
        "granite",
        rename={"head_dim": None},
        attention_multiplier=0.4,
        residual_multiplier=0.7,
        embedding_multiplier=2.0,
        logits_scaling=1.5,
    ),
    "gpt_oss": _architecture(
        "gpt_oss", layers=(SLIDING, FULL), sliding_window=SLIDING_WINDOW, num_local_experts=4, num_experts_per_tok=2
    ),
    "smollm3": _architecture("smollm3", no_rope_layer_interval=2),
    "starcoder2": _architecture("starcoder2", rename={"head_dim": None}, sliding_window=None),
    "gpt2": _architecture("gpt2", rename=GPT_NAMES, scale_attn_by_inverse_layer_idx=True),
    "gpt_neox": _architecture("gpt_neox", rename=NO_GQA, rotary_pct=0.25),
    "opt": _architecture("opt", rename={**NO_GQA, "intermediate_size": "ffn_dim"}),
    "lfm2": _architecture("lfm2", layers=("conv", FULL, "conv", FULL), block_auto_adjust_ff_dim=False, conv_L_cache=3),
    "qwen3_next": _architecture(
        "qwen3_next",
        layers=("linear_attention", FULL, "linear_attention", FULL),
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_conv_kernel_dim=4,
        partial_rotary_factor=0.5,
        shared_expert_intermediate_size=16,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        **MOE,
    ),
    "falcon": _architecture(
        "falcon", rename={**NO_GQA, "intermediate_size": "ffn_hidden_size"}, refused=True, multi_query=True, alibi=False
    ),
    "bloom": _architecture(
        "bloom",
        rename={**NO_GQA, "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "intermediate_size": None},
        refused=True,
    ),
    "mpt": _architecture(
        "mpt",
        rename={
            **NO_GQA,
            "hidden_size": "d_model",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "max_position_embeddings": "max_seq_len",
            "intermediate_size": None,
        },
        refused=True,
    ),
    "gptj": _architecture("gptj", rename=GPT_NAMES, refused=True, rotary_dim=8),
    "codegen": _architecture("codegen", rename=GPT_NAMES, refused=True, rotary_dim=8),
    "deepseek_v2": _architecture("deepseek_v2", refused=True, **MLA),
    "deepseek_v3": _architecture("deepseek_v3", refused=True, **MLA),
}
SUPPORTED: tuple[str, ...] = tuple(name for name, architecture in ARCHITECTURES.items() if not architecture.refused)
REFUSED: tuple[str, ...] = tuple(name for name, architecture in ARCHITECTURES.items() if architecture.refused)
# The hybrid and sliding layers hold a fixed floor beside the full-attention layers that a budget governs.
HYBRID: tuple[str, ...] = ("lfm2", "qwen3_next")
SLIDING_MODELS: tuple[str, ...] = tuple(
    name for name in SUPPORTED if ARCHITECTURES[name].settings.get("sliding_window")
)


def tiny_config(name: str, **overrides: Any) -> Any:
    """The configuration of the tiny model `name`, with common or architecture-specific fields overridden.

    `num_attention_heads`, `num_key_value_heads`, `head_dim` and `num_hidden_layers` are given in this spelling for
    every architecture, and the hidden size follows as `num_attention_heads * head_dim`, so GQA ratios are free:
    `tiny_config("llama", num_attention_heads=9, num_key_value_heads=3)`.
    """
    if name not in ARCHITECTURES:
        raise KeyError(f"no tiny architecture {name!r}; known: {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    pattern = architecture.layer_pattern
    fields = {**COMMON, **architecture.settings, **overrides}
    if "v_head_dim" in fields:  # in MLA head_dim is only the rotated part
        fields.setdefault("hidden_size", fields["num_attention_heads"] * fields["v_head_dim"])
    fields.setdefault("hidden_size", fields["num_attention_heads"] * fields["head_dim"])
    if pattern is not None and "layer_types" not in overrides:
        count = overrides.get("num_hidden_layers", len(pattern))
        fields |= {"num_hidden_layers": count, "layer_types": [pattern[i % len(pattern)] for i in range(count)]}
    if name == "opt":
        fields.setdefault("word_embed_proj_dim", fields["hidden_size"])
    spelled = {architecture.rename.get(key, key): value for key, value in fields.items()}
    return AutoConfig.for_model(
        architecture.model_type, **{key: value for key, value in spelled.items() if key is not None}
    )


def tiny_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A small random model of architecture `name` in eval mode, without gradients, the same for the same arguments.

    Weights are drawn so that attention is far from uniform (query and key projections are scaled up) and that norms,
    biases and attention sinks matter. The attention implementation is the one that transformers chooses by default,
    `reference_attention(name)`. Token id 0 is padding, and there is no end-of-text token. Takes the overrides of
    `tiny_config`.
    """
    with torch.random.fork_rng(devices=[]):  # model constructors draw from the global generator
        model = AutoModelForCausalLM.from_config(tiny_config(name, **overrides))
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        parameter.copy_(_draw(parameter_name, parameter, generator))
    model.generation_config.pad_token_id = PAD_TOKEN_ID
    model.generation_config.suppress_tokens = [PAD_TOKEN_ID]  # generate() would take it for padding in the next turn
    return model.eval().to(dtype)


def _draw(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random values for one parameter: fan-in scaled for matrices, near their initial value for vectors."""
    noise = torch.randn(like.shape, generator=generator)
    if any(part in name for part in QUERY_KEY_NORMS):
        return like.float() + 0.7 + 0.1 * noise
    if like.ndim < 2:
        if name.endswith("sinks"):  # as large as the largest logits of a row
            return 3.0 + 2.0 * noise
        if name.endswith("A_log"):  # slow decay: a state that forgets at once is mostly rounding noise after its norm
            return noise - 3.0
        return like.float() + 0.1 * noise
    if any(part in name for part in EMBEDDINGS):
        return noise
    # A gain of 2 on queries and on keys gives attention logits a deviation of 4: far from uniform, not yet one-hot.
    sharp = "linear_attn" not in name and any(part in name for part in QUERY_KEY_PROJECTIONS)
    inputs_first = any(part in name for part in CONV1D_PROJECTIONS)
    fan_in = like.shape[0] if inputs_first else prod(like.shape[1:]) if "conv" in name else like.shape[-1]
    return noise * ((2.0 if sharp else 1.0) / fan_in**0.5)


def reference_attention(name: str) -> str:
    """The attention implementation of the plain path: "sdpa", or "eager" where the model has no sdpa form."""
    architecture = ARCHITECTURES[name]
    model_class = AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(architecture.model_type))]
    return "sdpa" if model_class._supports_sdpa else "eager"


def random_text(length: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids `[rows, length]`, never the padding id, which `generate()` would take for padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(PAD_TOKEN_ID + 1, VOCAB_SIZE, (rows, length), generator=generator)


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack texts `[1, T_i]` into left-padded ids and attention mask, both `[len(rows), max T_i]`."""
    longest = max(row.shape[1] for row in rows)
    ids = torch.full((len(rows), longest), PAD_TOKEN_ID)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - row.shape[1] :] = row
        mask[i, longest - row.shape[1] :] = 1
    return ids, mask


@cache
def own_model(name: str) -> PreTrainedModel:
    """`tiny_model(name)` under its own attention implementation; shared by all tests, which must not change it."""
    return tiny_model(name)


@cache
def served_model(name: str) -> PreTrainedModel:
    """`tiny_model(name)` under kvbudget's attention; shared by all tests, which must not change it."""
    model = tiny_model(name)
    model.set_attn_implementation("kvbudget")
    return model


def in_chunks(
    model: PreTrainedModel, ids: torch.Tensor, past: Cache, chunk: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits `[rows, T, vocabulary]` of ids `[rows, T]` that are fed `chunk` tokens at a time, padding as in `mask`."""
    outputs = []
    for begin in range(0, ids.shape[1], chunk):
        end = min(begin + chunk, ids.shape[1])
        padding = {}
        if mask is not None:
            position = (mask.cumsum(1) - 1).clamp_min(0)
            padding = {"attention_mask": mask[:, :end], "position_ids": position[:, begin:end]}
        outputs.append(model(ids[:, begin:end], past_key_values=past, **padding).logits)
    return torch.cat(outputs, dim=1)


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one id per character from U+0101 to U+017F, so that text and ids determine each other."""
    vocabulary = {"<pad>": PAD_TOKEN_ID} | {chr(0x100 + i): i for i in range(1, VOCAB_SIZE)}
    characters = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = Split(Regex("."), "isolated")
    characters.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", padding_side="left")
