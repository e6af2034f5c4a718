"""Texts: where the contexts of an evaluation come from, and how they are cut into passages of tokens."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvbudget.errors import KVBudgetError, nearest
from kvbudget.eval import prose

# Cutting works on characters: a passage gets this much more text than its tokens are expected to need.
HEADROOM = 1.25
SAMPLE_CHARACTERS = 20_000
# Up to the end mark and the quotes that close with it.
SENTENCE = r".+?(?:[.!?][\"'\u201d\u2019)]*(?=\s)|$)"


def data_folder() -> Path | None:
    """The folder of real texts: ``$KVBUDGET_DATA``, else ``../shared/data`` beside the repository; None without one.

    Raises:
        KVBudgetError: when ``$KVBUDGET_DATA`` is set and is no folder.
    """
    named = os.environ.get("KVBUDGET_DATA")
    if named:
        if not Path(named).is_dir():
            raise KVBudgetError(f"KVBUDGET_DATA={named} is not a folder; unset it or give a folder of texts")
        return Path(named)
    for repository in (Path.cwd(), *Path(__file__).resolve().parents[3:4]):
        folder = repository.parent / "shared" / "data"
        if folder.is_dir():
            return folder
    return None


def data_file(*parts: str) -> Path:
    """A file of the data folder.

    Raises:
        KVBudgetError: when there is no data folder or no such file in it.
    """
    folder = data_folder()
    path = (folder or Path("../shared/data")).joinpath(*parts)
    if not path.is_file():
        raise KVBudgetError(f"{path} does not exist; point KVBUDGET_DATA to a folder that holds {'/'.join(parts)}")
    return path


def read_rows(path: Path) -> list[Any]:
    """Rows of a ``.jsonl`` or ``.jsonl.gz`` file."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    # Not splitlines(): JSON strings may hold other line separators.
    return [json.loads(line) for line in content.decode("utf-8").split("\n") if line.strip()]


def sources() -> list[str]:
    """Names that `documents` knows."""
    return [*_READERS, "prose"]


def default_source() -> str:
    """``books`` where the data folder has them, else ``prose`` (the built-in generator)."""
    folder = data_folder()
    return "books" if folder is not None and (folder / "books").is_dir() else "prose"


@lru_cache(maxsize=4)
def documents(source: str | None = None) -> tuple[str, ...]:
    """Long texts of a source: a name of `sources`, a text file, or a folder of ``.txt`` and ``.md`` files.

    None is `default_source`. Short items (problems, paragraphs, dialogues) are joined into one text.

    Raises:
        KVBudgetError: for a source that does not exist or is empty.
    """
    name = source or default_source()
    if name in _READERS:
        return tuple(_READERS[name]())
    if name == "prose":
        raise KVBudgetError("the prose source has no documents: it writes as much as is asked for (see passages)")
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md") and p.is_file())
    elif path.is_file():
        files = [path]
    else:
        raise KVBudgetError(f"text source {name!r} is neither a file nor a folder{nearest(name, sources())}")
    texts = tuple(text for file in files if (text := file.read_text(encoding="utf-8", errors="replace").strip()))
    if not texts:
        raise KVBudgetError(f"text source {name!r} holds no text; give a text file or a folder of .txt or .md files")
    return texts


def passages(
    tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int = 0, source: str | None = None
) -> list[Tensor]:
    """``count`` disjoint passages of exactly ``length`` tokens, int64 ``[length]`` each, without special tokens.

    The same arguments give the same passages; each starts at the beginning of a paragraph or a line where the text has any.

    Raises:
        KVBudgetError: when the source has too little text, saying for how many passages it suffices.
    """
    if min(length, count) < 1:
        raise KVBudgetError(f"{count} passages of {length} tokens hold no text; give at least 1 of each")
    if (source or default_source()) == "prose":
        return [_written(tokenizer, length, seed * 1_000_003 + i) for i in range(count)]
    found: list[Tensor] = []
    pieces = _pieces(tokenizer, length, seed, documents(source))
    for text in pieces:
        if len(found) == count:
            break
        ids = encode(tokenizer, text)
        if len(ids) >= length:
            found.append(ids[:length])
    if len(found) < count:
        raise KVBudgetError(
            f"{source or default_source()} has text for {len(found)} passages of {length} tokens, {count} were asked for; "
            "lower the count or the length, or give more text"
        )
    return found


def haystacks(
    tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int = 0, source: str | None = None
) -> list[list[str]]:
    """Sentences of ``count`` disjoint passages of about ``length`` tokens, to bury needles between."""
    texts = (tokenizer.decode(ids) for ids in passages(tokenizer, length, count, seed, source))
    # The last sentence is cut off in the middle.
    return [split_sentences(str(text))[:-1] for text in texts]


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, each on one line.

    >>> split_sentences('He said: "Go!" Then\\nhe went. No')
    ['He said: "Go!"', 'Then he went.', 'No']
    """
    flat = " ".join(text.split())
    return [match.group().strip() for match in re.finditer(SENTENCE, flat)]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids ``[n]`` of a text without special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.long)


def encode_pair(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> tuple[Tensor, Tensor]:
    """Token ids of a question and of the answer that follows it, as the joined text is tokenized.

    Tokens that hold only blanks go to the question: a model that is asked for digits must not lose on the space before.
    """
    whole, head = encode(tokenizer, question + answer), encode(tokenizer, question)
    same = 0
    while same < min(len(head), len(whole) - 1) and whole[same] == head[same]:
        same += 1
    while same < len(whole) - 1 and not str(tokenizer.decode(whole[same : same + 1])).strip():
        same += 1
    return whole[:same], whole[same:]


def beginning(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The special tokens ``[n]`` that the tokenizer puts in front of a text (n is 0 or 1 as a rule)."""
    ids = [i for i in tokenizer("", verbose=False).input_ids if i != tokenizer.eos_token_id]
    return torch.tensor(ids, dtype=torch.long)


def _written(tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> Tensor:
    words = length
    while True:
        ids = encode(tokenizer, prose.write(words, seed))
        if len(ids) >= length:
            return ids[:length]
        words *= 2


def _pieces(tokenizer: PreTrainedTokenizerBase, length: int, seed: int, texts: tuple[str, ...]) -> Iterator[str]:
    """Disjoint pieces of the texts in a seeded order, each long enough for ``length`` tokens as a rule."""
    spans = []
    for index, text in enumerate(texts):
        sample = text[len(text) // 3 :][:SAMPLE_CHARACTERS]
        per_token = len(sample) / max(1, len(encode(tokenizer, sample)))
        width = max(1, int(length * per_token * HEADROOM))
        if len(text) * HEADROOM < width * 2:
            # A text of about one passage is used whole.
            spans.append((index, 0, len(text)))
            continue
        spans += [(index, begin, begin + width) for begin in range(0, len(text) - width + 1, width)]
    random.Random(seed).shuffle(spans)
    for index, begin, end in spans:
        yield _from_start(texts[index][begin:end], whole=begin == 0)


def _from_start(piece: str, *, whole: bool) -> str:
    """The piece from its first paragraph, line or sentence on, when that costs at most a tenth of it."""
    if whole:
        return piece.lstrip()
    limit = len(piece) // 10
    for mark in ("\n\n", "\n", ". "):
        at = piece.find(mark, 0, limit)
        if at >= 0:
            return piece[at + len(mark) :].lstrip()
    return piece.lstrip()


def _books() -> list[str]:
    return [_unwrapped(path.read_text(encoding="utf-8", errors="replace")) for path in _files("books", "*.txt")]


def _unwrapped(text: str) -> str:
    """Paragraphs on one line each: printed books break lines at a fixed width."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _wikitext() -> list[str]:
    return [data_file("wikitext2", "test.txt").read_text(encoding="utf-8")]


def _qmsum() -> list[str]:
    return [meeting(row) for row in read_rows(data_file("qmsum", "test.jsonl"))]


def meeting(row: Any) -> str:
    """The transcript of one QMSum meeting, a turn per line."""
    return "\n".join(f"{turn['speaker']}: {' '.join(turn['content'].split())}" for turn in row["meeting_transcripts"])


def _humaneval() -> list[str]:
    rows = read_rows(data_file("humaneval", "HumanEval.jsonl.gz"))
    return ["\n\n".join(row["prompt"] + row["canonical_solution"] for row in rows)]


def _gsm8k() -> list[str]:
    rows = read_rows(data_file("gsm8k", "test.jsonl"))
    return ["\n\n".join(f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows)]


def _xquad() -> list[str]:
    articles = json.loads(data_file("xquad_en", "xquad.en.json").read_text(encoding="utf-8"))["data"]
    return ["\n\n".join(p["context"] for article in articles for p in article["paragraphs"])]


def _mt_bench() -> list[str]:
    rows = read_rows(data_file("mt_bench", "mtbench101.jsonl"))
    turns = ((turn["user"], turn["bot"]) for row in rows for turn in row["history"])
    return ["\n\n".join(f"User: {user}\nAssistant: {bot}" for user, bot in turns)]


def _files(folder: str, pattern: str) -> list[Path]:
    root = data_folder()
    found = sorted((root / folder).glob(pattern)) if root is not None else []
    if not found:
        raise KVBudgetError(
            f"no {folder}/{pattern} in {root or '../shared/data'}; point KVBUDGET_DATA to a folder that has them, "
            "or use the source 'prose'"
        )
    return found


_READERS: dict[str, Callable[[], list[str]]] = {
    "books": _books,
    "wikitext2": _wikitext,
    "qmsum": _qmsum,
    "humaneval": _humaneval,
    "gsm8k": _gsm8k,
    "xquad": _xquad,
    "mt_bench": _mt_bench,
}
