"""Measures how evenly the native kernel shares ragged heads out to threads: processor time of each thread, from Linux.

    OMP_WAIT_POLICY=passive python benchmarks/thread_shares.py [--threads 2] [--lengths 65536,8192,8192] [--calls 200]

The share that the busiest thread would have if whole heads were dealt out, the longest first, stands beside it. Threads must
not spin while they wait, hence the variable.
"""

import argparse
from pathlib import Path

import torch

from kvbudget import kernels
from kvbudget.kernels import DenseOperand


def busy() -> dict[str, int]:
    """Nanoseconds of processor time by thread of this process."""
    return {task.name: int((task / "schedstat").read_text().split()[0]) for task in Path("/proc/self/task").iterdir()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", default="65536,8192,8192", help="entries of each KV head")
    parser.add_argument("--calls", type=int, default=200)
    chosen = parser.parse_args()
    lengths = [int(text) for text in chosen.lengths.split(",")]
    torch.set_num_threads(chosen.threads)
    generator = torch.Generator().manual_seed(0)
    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    key, value = (DenseOperand(torch.randn(sum(lengths), 64, generator=generator), begins) for _ in range(2))
    query = torch.randn(len(lengths), 3, 64, generator=generator)
    for _ in range(20):
        kernels.attend(query, key, value, lengths, scale=0.125)
    before = busy()
    for _ in range(chosen.calls):
        kernels.attend(query, key, value, lengths, scale=0.125)
    spent = sorted((after - before.get(name, 0) for name, after in busy().items()), reverse=True)[: chosen.threads]
    loads = [0] * chosen.threads
    for length in sorted(lengths, reverse=True):
        loads[loads.index(min(loads))] += length
    print(
        f"busiest thread: {spent[0] / sum(spent):.1%} of the time; by whole heads {max(loads) / sum(loads):.1%} of the entries"
    )


if __name__ == "__main__":
    main()
