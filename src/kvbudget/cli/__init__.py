"""The command line: kvbudget run | plan | methods | bench | report | calibrate | tune | info | demo."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated

import typer
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

import kvbudget
from kvbudget.cli.bench import bench, report
from kvbudget.cli.calibrate import calibrate
from kvbudget.cli.demo import demo
from kvbudget.cli.info import info
from kvbudget.cli.methods import methods
from kvbudget.cli.plan import plan
from kvbudget.cli.run import run
from kvbudget.cli.shell import Commands
from kvbudget.cli.tune import tune

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (run, plan, methods, bench, report, calibrate, tune, info, demo):
    # A docstring's lines end where the file's do; help is wrapped by the width of the terminal.
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    app.command(help="\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs))(command)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Run any Hugging Face causal language model inside a KV-cache budget.

    [bold]Start here[/bold]

    [dim]$[/dim] kvbudget plan --model smollm2-135m --context 8192      what a budget buys

    [dim]$[/dim] kvbudget methods                                       what can spend it

    [dim]$[/dim] kvbudget run --model smollm2-135m --policy snapkv --budget 16MiB --prompt-file long.txt --question "Who?"
    """
    # A command prints its own lines; retries and advice of the libraries below would drown them.
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if version:
        print(f"kvbudget {kvbudget.__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """The console script."""
    app(sys.argv[1:])
