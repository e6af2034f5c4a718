"""Measures how evenly the native kernel shares ragged heads out to threads: processor time of each thread, from Linux.

    OMP_WAIT_POLICY=passive python benchmarks/thread_shares.py [--threads 2] [--lengths 65536,8192,8192] [--calls 200]

Beside it stand the largest share of the entries that the kernel gives a thread, and what the best placement of whole heads
would. Threads must not spin while they wait, hence the variable.
"""

import argparse
from pathlib import Path

import torch

from kvbudget import kernels
from kvbudget.kernels import DenseOperand, native
from kvbudget.placement import balanced


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
    shares = map(sum, native.thread_shares(lengths, chosen.threads))
    whole = balanced(lengths, chosen.threads).slowest(lengths)
    print(
        f"busiest thread: {spent[0] / sum(spent):.1%} of the time for {max(shares) / sum(lengths):.1%} of the entries; "
        f"by whole heads {whole / sum(lengths):.1%} of the entries"
    )


if __name__ == "__main__":
    main()
