"""The matrix of an evaluation: which policies, budgets and tasks make its cells, as a value read from YAML or options."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from kvbudget.budget import Budget
from kvbudget.errors import KVBudgetError, nearest
from kvbudget.eval import tasks
from kvbudget.methods import parse, registry
from kvbudget.policy.policy import MOST, parse_terms


@dataclass(frozen=True)
class Cell:
    """One policy under one budget at one task; its `key` names it across runs.

    ``visible`` says that the question is part of the text when it is compressed.
    """

    model: str
    dtype: str
    policy: str
    budget: str
    task: str
    visible: bool
    count: int
    seed: int

    @property
    def key(self) -> str:
        """Hash of everything that the cell's result depends on."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Matrix:
    """Policies x budgets x tasks on one model; policies that need no budget (full, codecs alone) run once without.

    Attributes:
        model: name, folder, hub id or GGUF file.
        policies, budgets, tasks: texts, as on the command line. The policy ``all`` stands for `every_policy`, and
            ``-finch`` leaves one out. A task may carry ``@visible``, which puts the question into the text that is
            compressed (``needle(length=2048)@visible``).
        length: tokens per context, for tasks that do not name their own. count: contexts per cell. seed: of every example.
        dtype: of the model. text: a file or folder of texts for contexts (None: what is at hand).
        decode_speed: measure it, on the first context of the first task.
    """

    model: str = "smollm2-135m"
    policies: tuple[str, ...] = ("snapkv", "knorm", "streaming_llm")
    budgets: tuple[str, ...] = ("50%", "25%", "10%")
    tasks: tuple[str, ...] = ("fidelity",)
    length: int | None = None
    count: int = 16
    seed: int = 0
    dtype: str = "float32"
    text: str | None = None
    decode_speed: bool = True

    def __post_init__(self) -> None:
        for name in ("policies", "budgets", "tasks"):
            if not getattr(self, name):
                raise KVBudgetError(f"an evaluation without {name} measures nothing; name at least one")
        for name in ("count", "length"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise KVBudgetError(f"{name}={value!r} must be a whole number, at least 1")
        if type(self.seed) is not int or not 0 <= self.seed <= MOST:
            raise KVBudgetError(f"seed={self.seed!r} must be a whole number from 0 to {MOST}")
        for name in ("model", "dtype", "text"):
            if not isinstance(getattr(self, name), str) and not (name == "text" and self.text is None):
                raise KVBudgetError(f"{name}={getattr(self, name)!r} must be a word")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Matrix:
        """Makes a matrix from plain data; unknown names are refused with the nearest match."""
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise KVBudgetError(f"an evaluation has no field {name!r}{nearest(name, known)}")
        lists = {}
        for name in {"policies", "budgets", "tasks"} & set(values):
            if not isinstance(values[name], (list, tuple)):
                raise KVBudgetError(f"{name}: {values[name]!r} must be a list, such as [{values[name]}]")
            lists[name] = tuple(map(str, values[name]))
        return cls(**{**values, **lists})

    @classmethod
    def from_yaml(cls, path: str | Path) -> Matrix:
        """Reads a YAML mapping with the fields of `Matrix`."""
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise KVBudgetError(f"matrix file {str(path)!r} cannot be read: {reason}") from error
        if not isinstance(content, dict):
            raise KVBudgetError(f"matrix file {str(path)!r} must hold a mapping with policies, budgets and tasks")
        return cls.from_mapping(content)

    def groups(self) -> Iterator[list[Cell]]:
        """Cells that share their contexts, the full cache first: one group per task."""
        for task in self.tasks:
            name, _, mode = task.partition("@")
            if mode not in ("", "visible"):
                raise KVBudgetError(f"task {task!r}: after @ only 'visible' is known")
            name = self._task(name)
            cells = [self._cell("full", "full", name, bool(mode))]
            for policy in self._chosen():
                for budget in self._budgets(policy):
                    cell = self._cell(policy, budget, name, bool(mode))
                    if cell not in cells:
                        cells.append(cell)
            yield cells

    def _chosen(self) -> list[str]:
        left_out = {text[1:] for text in self.policies if text.startswith("-")}
        named = [text for text in self.policies if not text.startswith("-")]
        for name in left_out:
            parse(name)
        return [p for text in named for p in (every_policy() if text == "all" else [text]) if p not in left_out]

    def _task(self, text: str) -> str:
        """The task's text with the matrix's length and text filled in where the task takes them and names none."""
        task = tasks.parse(text)
        given = dict(parse_terms(text)[0][1])
        for name in ("length", "text"):
            value = getattr(self, name)
            if value is not None and hasattr(task, name):
                given.setdefault(name, value)
        return tasks.parse(text).name + (f"({', '.join(f'{k}={v!r}' for k, v in given.items())})" if given else "")

    def _budgets(self, policy: str) -> Sequence[str]:
        if policy == "auto":
            return self.budgets
        parts = parse(policy).parts()
        return self.budgets if parts.scorer is not None or parts.plan is not None else ("full",)

    def _cell(self, policy: str, budget: str, task: str, visible: bool) -> Cell:
        text = policy if policy == "auto" else str(parse(policy))
        limit = str(Budget.parse(None if budget == "full" else budget))
        return Cell(self.model, self.dtype, text, limit, task, visible, self.count, self.seed)


def every_policy() -> list[str]:
    """Methods that need nothing beforehand: no calibration, no decoder stack that is stepped layer by layer.

    >>> "snapkv" in every_policy(), "full" in every_policy()
    (True, False)
    """
    return [
        name for name, kind in registry().items() if name != "full" and not {"calibration", "driver"} & {*kind.needs}
    ]
