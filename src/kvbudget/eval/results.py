"""Results on disk: one JSON line per finished cell, and a journal of the examples of cells that are under way."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbudget.errors import KVBudgetError

# A task on which the full cache itself does not come this far from chance to perfect cannot show a loss.
INFORMATIVE = 0.5


@dataclass(frozen=True)
class ResultsFile:
    """``path`` holds a line per finished cell; ``path.journal`` a line per example until its cell is finished.

    Every line is written and flushed whole, so a kill loses at most the examples that were being computed. A line cut off
    by a kill is passed over.
    """

    path: Path

    @property
    def journal(self) -> Path:
        return self.path.with_name(self.path.name + ".journal")

    def cells(self) -> list[dict[str, Any]]:
        """Finished cells in the order in which they finished; a cell that was run again counts with its last result."""
        return list({line["key"]: line for line in _lines(self.path)}.values())

    def examples(self) -> dict[tuple[str, int], dict[str, Any]]:
        """Example results by cell key and number."""
        return {(line["key"], line["example"]): line for line in _lines(self.journal)}

    def add_example(self, line: dict[str, Any]) -> None:
        """Appends an example's result to the journal."""
        _append(self.journal, line)

    def add_cell(self, line: dict[str, Any]) -> None:
        """Appends a finished cell."""
        _append(self.path, line)

    def weak_tasks(self) -> list[str]:
        """Titles of the tasks that show nothing about a policy, because the full cache itself cannot do them."""
        return sorted(title(c) for c in self.cells() if c["policy"] == "full" and not informative(c))

    def drop_journal(self) -> None:
        """Removes the journal once every cell is finished."""
        self.journal.unlink(missing_ok=True)


def title(cell: dict[str, Any]) -> str:
    """The task of a cell, as on the command line."""
    return cell["task"] + ("@visible" if cell["visible"] else "")


def informative(full: dict[str, Any]) -> bool:
    """Whether the full cache's result leaves room to see a loss; tasks that measure distances from it always do."""
    if not full["labeled"]:
        return True
    if not full["scores"]:
        return False
    mean = full["scores"][full["headline"]]["mean"]
    return (mean - full["chance"]) / (1.0 - full["chance"]) >= INFORMATIVE


def _append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        # A kill may have left half a line behind: close it, so that it does not swallow this one.
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write((json.dumps(line) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    if path.is_dir():
        raise KVBudgetError(f"{str(path)!r} is a folder; give the JSON lines file that kvbudget bench wrote")
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "key" in line:
            yield line
