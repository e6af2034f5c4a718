"""kvbudget calibrate: fit a method to a model, once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbudget.calibrate import TextCalibration, build
from kvbudget.calibrate import calibrate as fit
from kvbudget.cli.shell import notice
from kvbudget.errors import PolicyError
from kvbudget.eval.texts import default_source, passages
from kvbudget.models import load
from kvbudget.policy.policy import parse_terms


def calibrate(
    method: Annotated[str, typer.Argument(help='A method that needs it, such as razor_attention or "name(x=1)".')],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Short name, hub id, folder or .gguf file.")
    ] = "smollm2-135m",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write; by default where the method looks for it.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", help="Where texts come from: a source of kvbudget bench, a file or a folder."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which passages of the texts.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")] = None,
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
) -> None:
    """Find out what a method needs to know about a model, and keep it for every later run.

    Fits to texts go on where they were stopped.

    [dim]$[/dim] kvbudget calibrate razor_attention --model smollm2-135m

    [dim]$[/dim] kvbudget calibrate "qfilters(count=8)" --text corpus/
    """
    terms = parse_terms(method)
    if len(terms) != 1:
        raise PolicyError(f"{method!r} names {len(terms)} methods; calibrate them one by one")
    ((name, parameters),) = terms
    calibration = build(name, **parameters)
    network, tokenizer = load(model, dtype=dtype, device=device)
    texts = None
    if isinstance(calibration, TextCalibration):
        texts = passages(tokenizer, calibration.length, calibration.count, seed=seed, source=text)
        notice(f"{calibration.count} texts of {calibration.length} tokens from {text or default_source()}")
    elif text is not None:
        raise PolicyError(f"the calibration of {name} reads no texts; leave out --text")
    notice(f"fitting {name} to {model}")
    print(fit(name, network, output, texts=texts, progress=_progress if texts else None, **parameters))


def _progress(done: int, total: int) -> None:
    notice(f"text {done} of {total}")
