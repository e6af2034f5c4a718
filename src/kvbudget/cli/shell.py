"""The shell around every command: one line on stderr and a fixed exit code for whatever a user can cause."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from kvbudget.errors import KVBudgetError

BAD_INPUT = 2
INTERRUPTED = 130
PIPE_WIDTH = 140
LAST_SEED = 2**31 - 1


class Commands(TyperGroup):
    """Commands whose errors are lines, not tracebacks: 2 for bad input, 130 for an interrupt."""

    def main(self, args: Sequence[str] | None = None, *positional: Any, **options: Any) -> Any:
        """Runs a command line and exits."""
        options |= {"standalone_mode": False, "prog_name": "kvbudget"}
        try:
            sys.exit(super().main(args, *positional, **options) or 0)
        except KVBudgetError as error:
            _fail(_with_model(str(error), sys.argv[1:] if args is None else args))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except OSError as error:
            if error.filename is None:
                raise
            _fail(f"{str(error.filename)!r} cannot be read or written: {error.strerror}; give another path")
        except Exception as error:
            # typer has had more than one base class for what is wrong with a command line; all of them have this method.
            message = getattr(error, "format_message", None)
            if message is None:
                raise
            context = getattr(error, "ctx", None)
            path = context.command_path if context is not None else "kvbudget"
            _fail(f"{message()} (see {path} --help)")


def stdout() -> Console:
    """Where results go. Made anew each time, since tests replace the stream; a pipe gets wide tables."""
    return Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH)


def stderr() -> Console:
    """Where progress and notices go, so that stdout can be piped."""
    return Console(stderr=True, highlight=False)


def progress() -> Progress:
    """A bar with what is done, of how much, and the time left, which leaves no trace; a pipe gets none."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = stderr()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def notice(text: str) -> None:
    """One line beside the result, on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(data: Any) -> None:
    """The only thing on stdout under --json."""
    print(json.dumps(data, indent=2))


def with_model(message: str, model: str | None) -> str:
    """The commands that a message advises, for this model (None: the default of all commands)."""
    return message.replace(" --model <the model>", f" --model {shlex.quote(model)}" if model else "")


def _with_model(message: str, arguments: Sequence[str]) -> str:
    """As `with_model`, for the model that these arguments name."""
    named = [value for option, value in pairwise(arguments) if option in ("--model", "-m")]
    named += [argument.removeprefix("--model=") for argument in arguments if argument.startswith("--model=")]
    return with_model(message, named[-1] if named else None)


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(BAD_INPUT)
