"""Number formats for keys and values: bfloat16, 8-bit floats, 8-bit integers and posits, without any calibration."""

from dataclasses import dataclass
from typing import Any

from kvbudget.codecs.base import Codec
from kvbudget.codecs.formats import BFloat16, Float8, Posit
from kvbudget.codecs.integer import TokenQuant
from kvbudget.errors import PolicyError
from kvbudget.policy.base import Recipe

HALVES = "Compressed Real Numbers for AI: a case-study using a RISC-V CPU, arXiv 2309.07158, 2023"


@dataclass(frozen=True)
class NumberFormat(Recipe):
    """Keys and values in a smaller number format, element by element."""

    role = "codec"
    phase = "prefill and decode"
    paper = HALVES
    lossless_when_fits = False
    prefix_reusable = True

    def parts(self) -> dict[str, Any]:
        return {"codec": (self._codec(), self._codec())}

    def _codec(self) -> Codec:
        raise NotImplementedError


@dataclass(frozen=True)
class BF16(NumberFormat):
    """Stores keys and values as bfloat16, whatever the model computes in: half of float32's bytes, and no loss beyond it.

    Paper: Rossi et al., arXiv 2309.07158, 2023 (formats decompressed right before the arithmetic). True bits: 16.
    """

    name = "bf16"

    def _codec(self) -> Codec:
        return BFloat16()


@dataclass(frozen=True)
class FP8E4M3(NumberFormat):
    """Stores keys and values as 8-bit floats with 4 exponent bits and one scale per KV head of a sequence.

    As the fp8 caches of vLLM and of transformers (there with a scale per layer): the scale is found from the first entries
    that are coded, with a factor of two to spare, and stays. Relative error at most 1/16. True bits: 8.
    """

    name = "fp8_e4m3"

    def _codec(self) -> Codec:
        return Float8(kind=self.name)


@dataclass(frozen=True)
class FP8E5M2(NumberFormat):
    """Stores keys and values as 8-bit floats with 5 exponent bits: more range, less precision than fp8_e4m3.

    Relative error at most 1/8. True bits: 8, and one scale per KV head of a sequence.
    """

    name = "fp8_e5m2"

    def _codec(self) -> Codec:
        return Float8(kind=self.name)


@dataclass(frozen=True)
class Int8(NumberFormat):
    """Stores keys and values as 8-bit integers, min-max per entry and head (a scale and a zero for all its channels).

    True bits: 8 + 32 / head_dim. Attended without decoding.
    """

    name = "int8"

    def _codec(self) -> Codec:
        return TokenQuant(bits=8, group=1024)


@dataclass(frozen=True)
class Posit8(NumberFormat):
    """Stores keys and values as 8-bit posits, scaled by a power of two per KV head so that the median lies near one.

    Paper: Rossi et al., arXiv 2309.07158, 2023. The scale is found from the first entries that are coded and stays. On
    normal data the mean squared error is a seventh of that of fp8_e4m3. True bits: 8.

    Attributes:
        es: exponent bits (0: best for data of one magnitude; 2: the standard of 2022).
    """

    name = "posit8"

    es: int = 0

    def __post_init__(self) -> None:
        _check_es(self.es)

    def _codec(self) -> Codec:
        return Posit(bits=8, es=self.es)


@dataclass(frozen=True)
class Posit16(NumberFormat):
    """Stores keys and values as 16-bit posits: more precise than bfloat16 near the median of a head. True bits: 16.

    Paper: Rossi et al., arXiv 2309.07158, 2023.

    Attributes:
        es: exponent bits (1 or the 2022 standard's 2).
    """

    name = "posit16"

    es: int = 1

    def __post_init__(self) -> None:
        _check_es(self.es)

    def _codec(self) -> Codec:
        return Posit(bits=16, es=self.es)


def _check_es(es: int) -> None:
    if es not in (0, 1, 2, 3):
        raise PolicyError(f"es={es} exponent bits make no useful posit; give 0, 1, 2 or 3")
