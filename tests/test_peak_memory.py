"""The process's peak memory does not grow with the prompt under a byte budget."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "peak_memory.py"


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["snapkv+adakv"])
def test_a_16k_prompt_under_4_mib_peaks_within_64_mib_of_a_2k_prompt(policy: str) -> None:
    run = subprocess.run(
        [sys.executable, str(BENCHMARK), "--policy", policy, "--budget", "4MiB", "--tokens", "2048,16384"],
        capture_output=True,
        text=True,
        check=True,
    )
    short, long = map(json.loads, run.stdout.splitlines())
    assert (short["tokens"], long["tokens"]) == (2048, 16384)
    assert long["cache_bytes"] <= 4 * 2**20
    assert long["more_than_first_mib"] <= 64
    assert long["cache_peak_bytes"] <= 1.05 * short["cache_peak_bytes"]
