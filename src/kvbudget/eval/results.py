"""Results on disk: one JSON line per finished cell, and a journal of the examples of cells that are under way."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows, where two runs are not kept apart
    fcntl = None  # type: ignore[assignment]

from kvbudget.errors import KVBudgetError
from kvbudget.eval.stats import bootstrap
from kvbudget.files import written_whole

# A task on which the full cache itself does not come this far from chance to perfect cannot show a loss.
INFORMATIVE = 0.5
BEGIN = '{"key": "'
"""How every line begins."""


@dataclass(frozen=True)
class ResultsFile:
    """``path`` holds a line per finished cell; ``path.journal`` a line per example until its cell is finished.

    Every line is written and flushed whole, so a kill loses at most the examples that were being computed. A line cut off
    by a kill is passed over; a file with other lines is refused, and stays as it is.
    """

    path: Path

    @property
    def journal(self) -> Path:
        return self.path.with_name(self.path.name + ".journal")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Makes the file, and keeps other runs from writing to it until the end, or until this process has ended.

        Raises:
            KVBudgetError: where another run holds it. OSError: where it cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise KVBudgetError(
                        f"another run is writing to {str(self.path)!r}; wait for its end or give another file with --results "
                        "(kvbudget report joins several)"
                    ) from None
            yield

    def cells(
        self, needed: Sequence[str] = ("policy", "task", "visible", "labeled", "scores", "error")
    ) -> list[dict[str, Any]]:
        """Finished cells in the order in which they finished; a cell that was run again counts with its last result.

        Raises:
            KVBudgetError: for a line that has not all the ``needed`` fields.
        """
        return list({line["key"]: line for line in _lines(self.path, needed)}.values())

    def report(self) -> list[dict[str, Any]]:
        """As `cells`, and of tasks of which no cell has finished yet the contexts that all their cells have, from two on."""
        cells = self.cells()
        if not (examples := self.examples()):
            return cells
        finished = {title(cell) for cell in cells}
        under_way: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for line in sorted(examples.values(), key=lambda line: int(line["example"])):
            if title(line["cell"]) not in finished:
                under_way.setdefault(title(line["cell"]), {}).setdefault(line["key"], []).append(line)
        for by_key in under_way.values():
            common = set.intersection(*({line["example"] for line in lines} for lines in by_key.values()))
            if len(common) > 1:
                cells += [
                    summary(key, lines[0]["cell"], [line for line in lines if line["example"] in common])
                    for key, lines in by_key.items()
                ]
        return cells

    def examples(self) -> dict[tuple[str, int], dict[str, Any]]:
        """Example results by cell key and number."""
        return {(line["key"], line["example"]): line for line in _lines(self.journal, ("example", "cell"))}

    def add_example(self, line: dict[str, Any]) -> None:
        """Appends an example's result to the journal."""
        _append(self.journal, line)

    def add_cell(self, line: dict[str, Any]) -> None:
        """Appends a finished cell."""
        _append(self.path, line)

    def weak_tasks(self) -> list[str]:
        """Titles of the tasks that show nothing about a policy, because the full cache itself cannot do them."""
        full = (c for c in self.cells() if c["policy"] == "full" and not c["error"])
        return sorted(title(c) for c in full if not informative(c))

    def drop_journal(self) -> None:
        """Removes the examples of finished cells, and the journal where no others are left."""
        finished = {cell["key"] for cell in self.cells()}
        left = [line for line in self.examples().values() if line["key"] not in finished]
        if left:
            with written_whole(self.journal) as unfinished:
                unfinished.write_text("".join(json.dumps(line) + "\n" for line in left), encoding="utf-8")
        else:
            self.journal.unlink(missing_ok=True)


def gather(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Every cell of several results files; of a cell that stands in two the later one counts.

    Raises:
        KVBudgetError: where a file holds no finished cell.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        cells = ResultsFile(path).report()
        if not cells:
            reason = "holds no finished cell" if path.exists() else "does not exist"
            raise KVBudgetError(f"{str(path)!r} {reason}; run kvbudget bench --results {path} first")
        found |= {cell["key"]: cell for cell in cells}
    return list(found.values())


def mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means by name; a name may be missing from some rows."""
    named = {name: [row[name] for row in rows if name in row] for name in rows[0]}
    return {name: sum(values) / len(values) for name, values in named.items()}


def summary(
    key: str, about: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], error: str | None = None
) -> dict[str, Any]:
    """The line of a cell from those of its examples; ``about`` are its fields and what its task says of its scores."""
    scores = {}
    for name in lines[0]["scores"] if lines else ():
        interval = bootstrap([line["scores"][name] for line in lines], seed=about["seed"])
        scores[name] = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    return {
        "key": key,
        **about,
        "scores": scores,
        "costs": mean([line["costs"] for line in lines]) if lines else {},
        "examples": [{"scores": line["scores"], "info": line["info"]} for line in lines],
        "kept": lines[0].get("kept", []) if lines else [],
        "layer_errors": lines[0].get("layer_errors", []) if lines else [],
        "error": error,
    }


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


def _lines(path: Path, needed: Sequence[str]) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    if path.is_dir():
        raise KVBudgetError(f"{str(path)!r} is a folder; give the JSON lines file that kvbudget bench wrote")
    for number, text in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            if BEGIN.startswith(text.strip("\0")[: len(BEGIN)]):  # cut off
                continue
            line = None
        if not isinstance(line, dict) or not {"key", *needed} <= line.keys():
            raise KVBudgetError(
                f"line {number} of {str(path)!r} is none that this command writes or reads: {text[:40]!r}; give another file"
            )
        yield line
