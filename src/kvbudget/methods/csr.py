"""CSR: keys and values as short sums of atoms."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kvbudget.codecs.dictionary import Sparse
from kvbudget.errors import PolicyError
from kvbudget.policy.artifact import Artifact
from kvbudget.policy.base import Recipe


@dataclass(frozen=True)
class CacheSparseRepresentation(Recipe):
    """Stores a key or value as ``terms`` atoms of its layer's dictionary, with a coefficient each.

    Paper: Zhang et al., arXiv 2412.11741, 2024 (AAAI 2025). ``kvbudget calibrate csr --model M`` learns one dictionary per
    layer for keys and one for values. Atoms are chosen by orthogonal matching pursuit, which costs a product with the
    dictionary per term (the paper's pursuit and its dictionary's size are unverified). Values are attended without decoding
    them, by one product of the dictionary with the weights of its atoms; so are keys that are coded after RoPE, by one with
    the query, where ``calibrate "csr(before_rope=False)"`` has fitted them so (the paper's choice is unverified). Indices
    take 2 bytes, coefficients 1, and a vector's scale 2: true bits per element ``(24 terms + 16) / head_dim``. Claim: on par
    with 2 to 4 bits of quantization, usable at about 1 bit.

    Attributes:
        terms: atoms of a key or value.
        residual: newest entries in full precision (Lexico: 128).
        sinks: first entries in full precision.
        file: the calibration ("": where ``kvbudget calibrate`` puts it).
    """

    name = "csr"
    role = "codec"
    phase = "prefill and decode"
    paper = "CSR: Achieving 1 Bit Key-Value Cache via Sparse Representation, arXiv 2412.11741, 2024"
    needs = ("calibration",)
    lossless_when_fits = False
    prefix_reusable = True

    terms: int = 4
    residual: int = 64
    sinks: int = 4
    file: str = ""
    keys: Tensor | None = field(default=None, repr=False, compare=False)
    values: Tensor | None = field(default=None, repr=False, compare=False)
    before_rope: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.terms < 1:
            raise PolicyError(f"csr: terms={self.terms} is no sum; give at least 1")

    def parts(self) -> dict[str, Any]:
        shared: dict[str, Any] = {"terms": self.terms, "residual": self.residual, "sinks": self.sinks}
        keys = Sparse(atoms=self.keys, before_rope=self.before_rope, **shared)
        return {"codec": (keys, Sparse(atoms=self.values, **shared))}

    def bind(self, fingerprint: str) -> "CacheSparseRepresentation":
        found = Artifact.load(self.name, fingerprint, self.file).tensors
        if self.terms > found["key"].shape[1]:
            raise PolicyError(
                f"csr: terms={self.terms} is more than the {found['key'].shape[1]} atoms of the dictionary"
            )
        before = bool(found.get("before_rope", True))
        return replace(self, keys=found["key"].float(), values=found["value"].float(), before_rope=before)
