"""The instruction sets to test; tools/sanitize.sh puts an instrumented extension in the place of the installed one."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if directory := os.environ.get("KVBUDGET_NATIVE_DIR"):
    name = "kvbudget.kernels._native"
    spec = importlib.util.spec_from_file_location(name, next(Path(directory).glob("_native*.so")))
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


@pytest.fixture(params=["generic", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    native = pytest.importorskip("kvbudget.kernels.native", reason="the native extension was not built")
    from kvbudget.errors import KVBudgetError

    before = native.instruction_set()
    try:
        native.use_instruction_set(request.param)
    except KVBudgetError as error:
        pytest.skip(str(error))
    yield request.param
    native.use_instruction_set(before)
