"""kvbudget run: answer a prompt under a budget, and say what it cost."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from kvbudget.budget import Budget
from kvbudget.cache import KVCache
from kvbudget.cli.shell import INTERRUPTED, LAST_SEED, notice, print_json, stdout
from kvbudget.cli.show import Prefilling, print_piece, print_table, to_dict
from kvbudget.compare import Run, compare
from kvbudget.errors import KVBudgetError, nearest
from kvbudget.generate import Message, generate
from kvbudget.methods import parse
from kvbudget.models import load

COLDEST = 1e-3


def run(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Short name, hub id, folder or .gguf file.")
    ] = "smollm2-135m",
    policy: Annotated[
        str, typer.Option("--policy", "-p", help='Methods joined by +, such as "snapkv(window=64)+adakv"; or auto.')
    ] = "auto",
    budget: Annotated[
        str | None, typer.Option("--budget", "-b", help="16MiB in all, 1024 entries per KV head, or 25% of the text.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", "-f", help="A text file; - reads stdin.")] = None,
    question: Annotated[str | None, typer.Option("--question", "-q", help="Asked after the prompt.")] = None,
    question_visible: Annotated[
        bool,
        typer.Option(
            "--question-visible/--question-hidden",
            help="Whether the question is part of the text when it is compressed; hidden, it could be any other.",
        ),
    ] = True,
    system: Annotated[str | None, typer.Option(help="A system message in front.")] = None,
    protect: Annotated[
        list[str] | None, typer.Option(help="system, or start:end in token positions: always kept. May be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Length of the answer at most.")] = 128,
    chunk_size: Annotated[int | None, typer.Option(help="Tokens per forward of the prefill.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0, max=100.0)] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.", min=0, max=LAST_SEED)] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Use the chat template, or continue the plain text.")
    ] = True,
    against: Annotated[
        str | None, typer.Option("--compare", help="full: run the full cache too, and measure the difference.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Keep the cache of the prompt in this file (not of a hidden question).")
    ] = None,
    codec: Annotated[str, typer.Option(help="Of --save: raw is exact, kvtc small (calibrate it first).")] = "raw",
    saved: Annotated[
        Path | None, typer.Option("--load", help="Go on from a saved cache; the prompt must begin with its text.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")] = None,
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
    allow_long: Annotated[bool, typer.Option(help="Only warn beyond the model's positions.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON alone, at the end.")] = False,
) -> None:
    """Answer a prompt under a budget: the answer is streamed, a table of what it cost follows.

    The prompt is the text of --prompt-file or --prompt; the question, if any, comes after it. Ctrl-C ends the answer; what
    there is of it and its table are printed.

    [dim]$[/dim] kvbudget run --model smollm2-135m --policy snapkv --budget 16MiB --prompt-file long.txt --question "Who?"

    [dim]$[/dim] kvbudget run --model smollm2-135m --budget 25% --prompt-file long.txt --question "Who?" --compare full

    [dim]$[/dim] kvbudget run --model smollm2-135m --policy "streaming_llm+kivi(bits=4)" --budget 512 --prompt "Once upon" --json

    [dim]$[/dim] kvbudget run --model smollm2-135m --policy snapkv --budget 10% -f long.txt --system "Be brief." --protect system

    [dim]$[/dim] kvbudget run --policy full -f long.txt --question "Who?" --question-hidden --save long.kv

    [dim]$[/dim] kvbudget run --load long.kv -f long.txt --question "And where?" --question-hidden
    """
    if against not in (None, "full"):
        raise KVBudgetError(f"--compare {against!r} is not known{nearest(str(against), ['full'])}")
    if 0 < temperature < COLDEST:
        raise KVBudgetError(
            f"--temperature {temperature} divides by almost nothing; give 0 (greedy) or at least {COLDEST}"
        )
    text = _prompt(prompt, prompt_file)
    messages: str | list[Message] = text
    if system is not None:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    options: dict[str, Any] = {
        "question": question,
        "question_visible": question_visible,
        "protect": _protect(protect or []),
        "max_new_tokens": max_new_tokens,
        "chunk_size": chunk_size,
        "chat": chat,
        "seed": seed,
        "allow_long": allow_long,
    }
    if temperature > 0:
        options |= {"do_sample": True, "temperature": temperature}
    Budget.parse(budget)
    if policy != "auto":
        parse(policy)  # before the model is loaded
    if against is not None and (save or saved):
        raise KVBudgetError("--compare runs several caches; leave out --save and --load")
    network, tokenizer = load(model, dtype=dtype, device=device)
    if saved is not None:
        options["cache"] = KVCache.load(saved, network)
    if save is not None:
        options["filled"] = lambda cache: notice(f"saved {cache.save(save, codec).nbytes:,} bytes to {save}")
    runs: list[Run] = []
    interrupted = False
    prefilling = Prefilling()
    try:
        with warnings.catch_warnings(), prefilling:
            warnings.showwarning = lambda message, *_: notice(f"warning: {message}")
            options |= {"progress": prefilling, "stream": None if json else print_piece}
            if against is None:
                runs.append(Run(generate(network, tokenizer, messages, policy=policy, budget=budget, **options)))
            else:
                begin = None if json else _heading
                for each in compare(network, tokenizer, messages, [(policy, budget)], begin=begin, **options):
                    runs.append(each)  # one by one, so that an interrupt leaves those that have ended
    except KeyboardInterrupt:
        notice(f"interrupted in the prefill, after {prefilling.done:,} of {prefilling.total:,} tokens")
        interrupted = True
    if runs and runs[-1].generation.interrupted:
        notice("interrupted: the answer is not complete")
        interrupted = True
    if json:
        print_json({"interrupted": interrupted, "runs": [to_dict(each) for each in runs]})
    elif runs:
        print()
        print_table(runs)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _heading(policy: str, budget: str) -> None:
    print(flush=True)
    stdout().rule(f"{policy}, {budget}", align="left")


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise KVBudgetError("give the prompt as either --prompt TEXT or --prompt-file FILE")
    if file is None:
        text = prompt or ""
    elif str(file) == "-":
        text = sys.stdin.read()
    else:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise KVBudgetError(f"prompt file {file} cannot be read: {reason}") from error
    if not text.strip():
        raise KVBudgetError(f"the prompt is empty{'' if file is None else f' (file {file})'}; give a text")
    return text


def _protect(values: list[str]) -> str | list[tuple[int, int]]:
    if values == ["system"] or (len(values) == 1 and values[0].isalpha()):
        return values[0]
    spans = []
    for value in values:
        found = re.fullmatch(r"(\d+):(\d+)", value)
        if found is None:
            raise KVBudgetError(f"--protect {value!r} is neither a role such as system nor start:end, such as 0:64")
        spans.append((int(found[1]), int(found[2])))
    return spans
