"""GGUF files: converted once to a folder of exact float32 safetensors, found there in a second ever after."""

import contextlib
import hashlib
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from platformdirs import user_cache_dir
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.integrations.gguf import GgufHeader, read_gguf_metadata

from kvbudget.errors import KVBudgetError

# Part of a converted folder's name: raised whenever what a conversion writes changes, so that old folders are not read.
_CONVERSION = "v1"
_UNFINISHED = ".converting-"


def cache_folder() -> Path:
    """Where converted models are kept: `$KVBUDGET_CACHE`, else the user's cache folder for kvbudget."""
    return Path(os.environ.get("KVBUDGET_CACHE") or user_cache_dir("kvbudget"))


def converted(path: Path) -> Path:
    """The folder of safetensors that holds the model and tokenizer of a GGUF file, converted now if need be.

    Weights are stored in float32, in which every quantized value is exact; bfloat16 would halve the folder but round
    the weights. The folder is named after the file's content and appears by one rename, so an interrupted conversion
    leaves nothing that a later call could take for a model. Raises KVBudgetError if the file is broken.
    """
    with _one_error(path):
        metadata, _ = read_gguf_metadata(str(path))
        _check_complete(path)
    folder = _folder(path)
    if folder.is_dir():
        return folder
    print(f"kvbudget: converting {path.name} once to {folder} (about half a minute)", file=sys.stderr, flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KVBudgetError(f"cannot write to {folder.parent}: {first_line(error)}; set KVBUDGET_CACHE") from error
    _sweep(folder.parent)
    with tempfile.TemporaryDirectory(prefix=f"{_UNFINISHED}{os.getpid()}-", dir=folder.parent) as unfinished:
        with _one_error(path), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            _convert(path, Path(unfinished) / "model", str(metadata.get("tokenizer.ggml.pre", "")))
        try:
            (Path(unfinished) / "model").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process finished the same conversion first
                raise
    return folder


def config_of(path: Path) -> PreTrainedConfig:
    """The configuration that a GGUF file's header describes; raises KVBudgetError if the file is broken."""
    with _one_error(path):
        read_gguf_metadata(str(path))
        folder = _folder(path)  # reads in a moment what the header's long lists of tokens take seconds for
        if folder.is_dir():
            return AutoConfig.from_pretrained(folder)
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


def _folder(path: Path) -> Path:
    return cache_folder() / f"{path.stem}-{_content_hash(path)}-{_CONVERSION}"


def _sweep(folder: Path) -> None:
    """Removes what processes that were killed in the middle of a conversion have left."""
    for left in folder.glob(f"{_UNFINISHED}*-*"):
        process = left.name.removeprefix(_UNFINISHED).split("-")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _convert(path: Path, target: Path, pre_tokenizer: str) -> None:
    """Write the model and the tokenizer of a GGUF file as a transformers folder."""
    model, info = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(f"it lacks weights: {sorted(info['missing_keys'])[:3]}")
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.padding_side = "left"
    restore_pre_tokenizer(tokenizer, pre_tokenizer)
    tokenizer.save_pretrained(target)


def restore_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Restore how the text is split before byte-pair encoding, where transformers ignores what the GGUF file names.

    "smollm" splits single digits off before anything else, so the blanks in front of a digit stay together, as in the
    model's own tokenizer and in llama.cpp; transformers' conversion would move the last of them to the digit.
    """
    if name == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )


def _check_complete(path: Path) -> None:
    """Find a truncated file at once, not after most of the conversion."""
    try:
        header = GgufHeader.from_file(str(path))
    except ValueError:  # a quantized type that this reader cannot measure; the conversion itself may know it
        return
    needed = header.data_start + max(tensor.offset + tensor.nbytes for tensor in header.tensors)
    if path.stat().st_size < needed:
        raise ValueError(f"it is truncated, {path.stat().st_size} of {needed} bytes")


def _content_hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _one_error(path: Path) -> Iterator[None]:
    """Turn whatever the GGUF readers raise on broken files into one clear line."""
    try:
        yield
    except Exception as error:
        reason = "its header is cut short" if isinstance(error, struct.error) else first_line(error)
        raise KVBudgetError(f"GGUF file {path} cannot be read: {reason}; download it again") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the next one where it announces that, or its class where it has none."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += f" {lines[1]}"
    return lines[0].rstrip(".") if lines else type(error).__name__
