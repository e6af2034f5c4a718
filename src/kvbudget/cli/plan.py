"""kvbudget plan: what a budget buys, from a configuration alone."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from kvbudget.budget import format_bytes
from kvbudget.cli.shell import print_json, stdout
from kvbudget.errors import KVBudgetError, nearest
from kvbudget.models import load_config
from kvbudget.plan import LADDER, CapacityPlan, Purchase
from kvbudget.plan import plan as make_plan

_DTYPES = ("float32", "bfloat16", "float16")


def plan(
    context: Annotated[int, typer.Option("--context", "-c", help="Tokens per sequence.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Short name, hub id, folder, config.json or .gguf file.")
    ] = "smollm2-135m",
    memory: Annotated[str | None, typer.Option(help="Bytes that the cache may take, such as 2GiB.")] = None,
    budget: Annotated[
        list[str] | None, typer.Option("--budget", "-b", help="Budgets to price (may be repeated) instead of a ladder.")
    ] = None,
    policy: Annotated[str, typer.Option("--policy", "-p", help="The evicting method.")] = "snapkv",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default what the checkpoint declares.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(
            help="Place KV heads on so many devices by the entries that they keep; loads the model.", min=2, max=64
        ),
    ] = None,
    texts: Annotated[
        int, typer.Option(help="Texts that --tensor-parallel measures: half to plan, half to judge.", min=2)
    ] = 8,
    text: Annotated[str | None, typer.Option(help="A file or folder of texts for --tensor-parallel.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Price a context length: the full cache, what each budget buys with which codec, and which fits.

    Only --tensor-parallel loads weights. A budget means here what it means in [bold]kvbudget run[/bold]: bytes of the whole
    batch, entries per sequence and KV head, or a fraction of the entries.

    [dim]$[/dim] kvbudget plan --model smollm2-135m --context 32768 --memory 512MiB

    [dim]$[/dim] kvbudget plan --model path/to/config.json --context 131072 --dtype bfloat16 --batch 8

    [dim]$[/dim] kvbudget plan --model smollm2-135m --context 8192 --budget 16MiB --budget 1024 --budget 10%

    [dim]$[/dim] kvbudget plan --model smollm2-135m --context 1024 --policy snapkv+adakv --budget 20% --tensor-parallel 2
    """
    if tensor_parallel is not None:
        if not budget or len(budget) > 1:
            raise KVBudgetError("--tensor-parallel measures one policy under one budget; give one --budget")
        _place(model, policy, budget[0], context, tensor_parallel, texts, text, dtype, json)
        return
    table = make_plan(
        load_config(model),
        context,
        memory=memory,
        budgets=budget or LADDER,
        policy=policy,
        dtype=_dtype(dtype),
        batch=batch,
    )
    if json:
        print_json(table.to_dict())
    else:
        _show(table)


def _show(plan: CapacityPlan) -> None:
    console = stdout()
    other = f" and {plan.other_layers} with a fixed cost" if plan.other_layers else ""
    console.print(
        f"{plan.model_type}: {plan.budgeted_layers} layers under a budget{other}, {plan.num_kv_heads} KV heads, {plan.dtype}; "
        f"{plan.batch} x {plan.context:,} tokens"
    )
    console.print(
        f"full cache: [bold]{format_bytes(plan.full_bytes)}[/bold]" + _of_memory(plan.full_bytes, plan.memory)
    )
    if plan.floor_bytes:
        console.print(
            f"of it no budget can shrink (sliding windows, recurrent states): {format_bytes(plan.floor_bytes)}"
        )
    if plan.max_positions is not None and plan.context > plan.max_positions:
        trained = f"{plan.max_positions:,} that the model was trained for"
        console.print(f"[yellow]{plan.context:,} tokens are more than the {trained}[/yellow]")
    codecs = list(dict.fromkeys(purchase.codec for purchase in plan.purchases))
    headers = ("full precision" if codec == "none" else codec for codec in codecs)
    grid = Table("budget", *headers, box=box.SIMPLE_HEAD, show_lines=True)
    for begin in range(0, len(plan.purchases), len(codecs)):
        row = plan.purchases[begin : begin + len(codecs)]
        grid.add_row(row[0].budget, *(_cell(purchase) for purchase in row))
    console.print(grid)
    console.print("entries per layer and KV head, and the bytes that they take with everything stored beside them")
    problems = {purchase.budget: purchase.problem for purchase in reversed(plan.purchases) if purchase.problem}
    for problem in reversed(problems.values()):  # of the first codec of each budget
        console.print(f"[yellow]{escape(problem)}[/yellow]")
    example = next((p for p in plan.purchases if p.fits is not False and p.entries == plan.context), None)
    if plan.memory is not None and example is not None:
        console.print(f"all {plan.context:,} tokens fit with --policy {example.policy!r}")


def _place(
    model: str,
    policy: str,
    budget: str,
    context: int,
    devices: int,
    count: int,
    text: str | None,
    dtype: str | None,
    json: bool,
) -> None:
    from kvbudget.eval.parallel import measure, simulate
    from kvbudget.models import load

    network, tokenizer = load(model, dtype=dtype)
    found = simulate(measure(network, tokenizer, policy, budget, context, count, text=text), devices)
    if json:
        print_json(found.to_dict())
        return
    console = stdout()
    console.print(
        f"{found.layers} layers of {found.heads} KV heads on {devices} devices; a layer's longest head keeps "
        f"{found.spread:.2f} times the mean"
    )
    grid = Table(box=box.SIMPLE_HEAD)
    for header in ("placement", "copies per layer", "efficiency, profiled", "efficiency, other texts"):
        grid.add_column(header, no_wrap=header == "placement")
    for name, copies, profiled, other in found.rows:
        grid.add_row(name, f"{copies:.1f}", f"{profiled:.1%}", f"{other:.1%}")
    console.print(grid)
    console.print("efficiency: mean load over that of the slowest device, layer by layer, in entries to attend to")


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in _DTYPES:
        raise KVBudgetError(f"unknown dtype {name!r}{nearest(name, _DTYPES)}")
    return getattr(torch, name)


def _cell(purchase: Purchase) -> str:
    if purchase.problem:
        return "[red]no[/red]"
    color = {True: "green", False: "red", None: "default"}[purchase.fits]
    mark = {True: " fits", False: " no", None: ""}[purchase.fits]
    return f"[{color}]{purchase.entries:,} ({purchase.share:.0%})\n{format_bytes(purchase.nbytes)}{mark}[/{color}]"


def _of_memory(nbytes: int, memory: int | None) -> str:
    if memory is None:
        return ""
    return f", {'fits into' if nbytes <= memory else 'more than'} {format_bytes(memory)}"
