"""kvbudget calibrate: fit a method to a model, once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbudget.calibrate import TextCalibration, build
from kvbudget.calibrate import calibrate as fit
from kvbudget.cli.shell import LAST_SEED, notice
from kvbudget.errors import PolicyError
from kvbudget.eval.texts import default_source, passages
from kvbudget.models import fingerprint, load
from kvbudget.policy.artifact import default_path
from kvbudget.policy.policy import parse_terms


def calibrate(
    method: Annotated[
        str,
        typer.Argument(help='A method that needs it, such as razor_attention or "name(x=1)", or several joined by +.'),
    ],
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
    seed: Annotated[int, typer.Option(help="Which passages of the texts.", min=0, max=LAST_SEED)] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")] = None,
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
    missing: Annotated[bool, typer.Option("--missing", help="Leave out what this model has a calibration of.")] = False,
) -> None:
    """Find out what methods need to know about a model, and keep it for every later run.

    Fits to texts go on where they were stopped.

    [dim]$[/dim] kvbudget calibrate razor_attention --model smollm2-135m

    [dim]$[/dim] kvbudget calibrate "qfilters(count=8)" --text corpus/
    """
    terms = parse_terms(method)
    if output is not None and len(terms) > 1:
        raise PolicyError(f"{method!r} names {len(terms)} methods, which do not go into one file; leave out --output")
    calibrations = [build(name, **parameters) for name, parameters in terms]
    if text is not None and not any(isinstance(calibration, TextCalibration) for calibration in calibrations):
        raise PolicyError(f"the calibration of {method} reads no texts; leave out --text")
    network, tokenizer = load(model, dtype=dtype, device=device)
    for (name, parameters), calibration in zip(terms, calibrations, strict=True):
        path = output or default_path(name, fingerprint(network))
        if missing and path.is_file():
            notice(f"{name} is there: {path}")
            continue
        texts = None
        if isinstance(calibration, TextCalibration):
            texts = passages(tokenizer, calibration.length, calibration.count, seed=seed, source=text)
            notice(f"{calibration.count} texts of {calibration.length} tokens from {text or default_source()}")
        notice(f"fitting {name} to {model}")
        print(fit(name, network, output, texts=texts, progress=_progress if texts else None, **parameters))


def _progress(done: int, total: int) -> None:
    notice(f"text {done} of {total}")
