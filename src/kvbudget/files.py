"""Files that come into being whole: written beside their place, then moved there; pages of which one part is made anew."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvbudget.errors import KVBudgetError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives an empty file to write, which replaces ``path`` at the end; what fails or is interrupted leaves nothing behind.

    Folders that are missing are made. Raises OSError where that or the writing fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".writing-", delete=False) as file:
        unfinished = Path(file.name)
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def insert(path: Path, name: str, text: str) -> None:
    """Puts a text between the marks ``<!-- name -->`` and ``<!-- /name -->`` of a Markdown page; the rest stays.

    Raises:
        KVBudgetError: when the page has no such marks; nothing is changed then.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    content = path.read_text(encoding="utf-8")
    head, _, rest = content.partition(begin)
    if end not in rest:
        raise KVBudgetError(f"{path} has no {begin} ... {end}; add both marks where the text belongs")
    with written_whole(path) as unfinished:
        unfinished.write_text(f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
