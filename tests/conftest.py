"""Shared settings of the tests: one thread, fixed seeds, modest property tests, and where the shared data lies."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, register_random, settings

torch.set_num_threads(1)


class TorchRandom:
    """Lets hypothesis seed torch's generator before every example, so that failures replay."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


register_random(TORCH_RANDOM := TorchRandom())  # type: ignore[arg-type]  # registered weakly, so it needs a name

settings.register_profile(
    "kvbudget",
    deadline=None,
    max_examples=40,
    stateful_step_count=20,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("thorough", parent=settings.get_profile("kvbudget"), max_examples=1000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "kvbudget"))

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same state of torch's generator."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts beside the repository; tests that need it are skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} does not exist")
    return SHARED_DATA
