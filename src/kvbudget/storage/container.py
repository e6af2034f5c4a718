"""The file of a saved cache: a fixed prefix, a header in JSON, tensors as safetensors, and a checksum over all of it.

Prefix: the 8 bytes ``KVBUDGET``, the version of the format (uint32), bytes of the header and of the tensors (uint64 each), all
little-endian, and the SHA-256 of these numbers, the header and the tensors.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from kvbudget.errors import CacheError
from kvbudget.files import written_whole

MAGIC = b"KVBUDGET"
VERSION = 1
_NUMBERS = struct.Struct("<8sIQQ")
_PREFIX = _NUMBERS.size + hashlib.sha256().digest_size


def write(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Writes the file by one rename, so that an interrupted run leaves nothing behind; returns its bytes.

    Raises:
        CacheError: when it cannot be written.
    """
    text = json.dumps(header).encode()
    body = save_tensors({name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()})
    numbers = _NUMBERS.pack(MAGIC, VERSION, len(text), len(body))
    try:
        with written_whole(path) as unfinished, unfinished.open("wb") as file:
            for piece in (numbers, _digest(numbers, text, body), text, body):
                file.write(piece)
    except OSError as error:
        raise CacheError(
            f"the cache cannot be written to {path}: {error.strerror or error}; give another path"
        ) from error
    return _PREFIX + len(text) + len(body)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file that `write` wrote.

    Raises:
        CacheError: when it cannot be read, is something else, has another version, is cut off or has been changed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CacheError(f"the saved cache {path} cannot be read: {error.strerror or error}") from error
    if content[: len(MAGIC)] != MAGIC:
        raise CacheError(f"{path} is not a saved cache; give a file that cache.save() wrote")
    if len(content) < _PREFIX:
        raise CacheError(
            f"{path} is cut off: {len(content)} bytes do not even hold the prefix of {_PREFIX}; save it again"
        )
    _, version, header_bytes, tensor_bytes = _NUMBERS.unpack_from(content)
    if version != VERSION:
        raise CacheError(
            f"{path} has version {version} of the format, this kvbudget reads version {VERSION}; save it again"
        )
    whole = _PREFIX + header_bytes + tensor_bytes
    if len(content) != whole:
        raise CacheError(f"{path} holds {len(content)} bytes of {whole}: it is cut off or was changed; save it again")
    text, body = content[_PREFIX : _PREFIX + header_bytes], content[_PREFIX + header_bytes :]
    if _digest(content[: _NUMBERS.size], text, body) != content[_NUMBERS.size : _PREFIX]:
        raise CacheError(f"{path} does not match its checksum: it was changed after it was saved; save it again")
    return json.loads(text), load_tensors(body)


def _digest(*pieces: bytes) -> bytes:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()
