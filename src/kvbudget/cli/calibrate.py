"""kvbudget calibrate: fit a method to a model, once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbudget.calibrate import calibrate as fit
from kvbudget.calibrate import registry
from kvbudget.cli.shell import notice
from kvbudget.errors import PolicyError, nearest
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
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")] = None,
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
) -> None:
    """Find out what a method needs to know about a model, and keep it for every later run.

    [dim]$[/dim] kvbudget calibrate razor_attention --model smollm2-135m
    """
    terms = parse_terms(method)
    if len(terms) != 1:
        raise PolicyError(f"{method!r} names {len(terms)} methods; calibrate them one by one")
    ((name, parameters),) = terms
    if name not in registry():
        raise PolicyError(f"there is no calibration for {name!r}{nearest(name, registry())}")
    network, _ = load(model, dtype=dtype, device=device)
    notice(f"fitting {name} to {model}")
    print(fit(name, network, output, **parameters))
