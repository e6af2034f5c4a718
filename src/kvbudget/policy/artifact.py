"""Calibration artifacts: safetensors files that say which method and which model they were made for."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvbudget.errors import KVBudgetError, PolicyError
from kvbudget.files import written_whole
from kvbudget.models.gguf import cache_folder

_FORMAT = "kvbudget-calibration-1"


@dataclass(frozen=True)
class Artifact:
    """What a calibration found: named tensors, for the ``method`` and the model of this ``fingerprint``.

    ``parameters`` are those of the calibration, for the record.
    """

    method: str
    fingerprint: str
    tensors: Mapping[str, Tensor]
    parameters: Mapping[str, Any]

    def save(self, path: str | Path | None = None) -> Path:
        """Writes the file by one rename, so that an interrupted run leaves nothing behind; returns where it is.

        Without a ``path`` it goes where `load` looks for it.

        Raises:
            KVBudgetError: when the file cannot be written.
        """
        target = default_path(self.method, self.fingerprint) if path is None else Path(path)
        parameters = json.dumps(dict(self.parameters), sort_keys=True)
        metadata = {
            "format": _FORMAT,
            "method": self.method,
            "fingerprint": self.fingerprint,
            "parameters": parameters,
            "checksum": _checksum(self.tensors, parameters),
        }
        try:
            with written_whole(target) as unfinished:
                save_file({name: x.clone() for name, x in self.tensors.items()}, unfinished, metadata)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise KVBudgetError(
                f"the calibration cannot be written to {target}: {reason}; give another path, or another folder as "
                "KVBUDGET_CACHE"
            ) from error
        return target

    @classmethod
    def load(cls, method: str, fingerprint: str, path: str | Path | None = None) -> "Artifact":
        """Reads the artifact of a method for one model, from ``path`` or (None, "") from where `save` puts it by default.

        Raises:
            PolicyError: when there is none, it cannot be read, or it was made for another method or model; each names the
                command that makes the right one.
        """
        source = Path(path) if path else default_path(method, fingerprint)
        remedy = f"run: kvbudget calibrate {method} --model <the model>"
        if not source.is_file():
            where = f" ({source} does not exist)" if path else ""
            raise PolicyError(f"{method} needs a calibration for this model{where}; {remedy}")
        try:
            with safe_open(source, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            raise PolicyError(f"the calibration {source} cannot be read: {error}; {remedy}") from error
        if metadata.get("format") != _FORMAT or metadata.get("method") != method:
            made = metadata.get("method", "something else")
            raise PolicyError(f"{source} is a calibration of {made}, not of {method}; {remedy}")
        if metadata["fingerprint"] != fingerprint:
            raise PolicyError(
                f"{source} was made for another model (fingerprint {metadata['fingerprint']}, this one has {fingerprint}); "
                + remedy
            )
        parameters = metadata["parameters"]
        if metadata.get("checksum") not in (None, _checksum(tensors, parameters)):  # none in files of earlier versions
            raise PolicyError(f"{source} does not match its checksum: it was changed after it was made; {remedy}")
        return cls(method, fingerprint, tensors, json.loads(parameters))


def default_path(method: str, fingerprint: str) -> Path:
    """Where the artifact of a method for one model is kept: below ``$KVBUDGET_CACHE`` or the user's cache folder."""
    return cache_folder() / "calibration" / f"{method}-{fingerprint}.safetensors"


def _checksum(tensors: Mapping[str, Tensor], parameters: str) -> str:
    digest = hashlib.sha256(parameters.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
