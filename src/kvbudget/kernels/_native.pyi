"""Types of the extension module; native.py documents the tuples."""

from collections.abc import Sequence
from typing import Any

def attend(
    key: tuple[Any, ...],
    value: tuple[Any, ...],
    call: tuple[Any, ...],
    threads: int,
    out: int,
    lse: int,
    logits: int,
) -> None: ...
def mass(key: tuple[Any, ...], call: tuple[Any, ...], threads: int, lse: int, sums: int, weights: int) -> None: ...
def mass_of_logits(lengths: Sequence[int], queries: int, threads: int, logits: int, lse: int, sums: int) -> None: ...
def encode(
    data: int,
    type: int,
    stride: int,
    width: int,
    by_units: bool,
    bits: int,
    group: int,
    count: int,
    threads: int,
    codes: int,
    scale: int,
    zero: int,
) -> None: ...
def merge(outs: Sequence[int], lses: Sequence[int], queries: int, width: int, out: int, lse: int) -> None: ...
def scatter(columns: list[tuple[int, int, int]], begins: Sequence[int], counts: Sequence[int]) -> None: ...
def instruction_set() -> str: ...
def use(name: str) -> bool: ...
