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
def shares(lengths: Sequence[int], threads: int) -> list[list[int]]: ...
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
def count_kept(flags: tuple[Any, ...], lengths: Sequence[int]) -> list[int] | None: ...
def compact(
    columns: list[tuple[int, int, int]],
    flags: tuple[Any, ...],
    before: tuple[Sequence[int], ...],
    after: tuple[Sequence[int], ...],
    threads: int,
) -> None: ...
def select(cells: tuple[Any, ...], counts: Sequence[int], keep: int) -> bool: ...

class Lane:
    def __init__(
        self,
        rows: int,
        queries: int,
        portions: list[tuple[Any, ...]],
        room: tuple[Sequence[int], ...],
        zeroed: Sequence[int],
        type: int,
        first: int,
        sums: list[tuple[Sequence[int], float, float]],
    ) -> None: ...
    def step(
        self,
        query: object,
        key: object,
        value: object,
        dtype: object,
        seen: list[int],
        held: list[tuple[Any, ...]],
        grown: list[Any],
        scale: float,
        softcap: float | None,
        window: int | None,
        out: object,
        lse: int,
        keep_logits: bool,
        add: bool,
        apart: int,
        threads: int,
    ) -> bool: ...
    def accumulate(self, states: Sequence[int], decay: Sequence[float], factor: float, threads: int) -> bool: ...

def instruction_set() -> str: ...
def use(name: str) -> bool: ...
