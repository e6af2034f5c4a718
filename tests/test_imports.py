"""The house stands as designed: imports go downwards, nothing is patched at import, every file says what it is for."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((SOURCE / "kvbudget").rglob("*.py"))
}

# From the bottom to the top; a module may import from its own floor and from those below. Modules that no floor names
# (costs, attention, enforcer, cache, prefill, report, ...) and the package's front stand on the one called "cache".
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "files"),
    ("budget", "kernels", "models"),
    ("codecs",),
    ("segments", "layer"),
    ("policy",),
    ("methods",),
    ("cache",),
    ("calibrate",),
    ("eval", "compare", "cli", "__main__"),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def room(module: str) -> str | None:
    """The part of the package that a module belongs to (None: the package's own front)."""
    return module.split(".")[1] if "." in module else None


def floor_of(module: str) -> int:
    return FLOOR_OF.get(room(module) or "", FLOOR_OF["cache"])


def imports(tree: ast.AST, *, lazy: bool) -> Iterator[str]:
    """Modules of kvbudget that a file imports at run time; ``lazy`` includes imports inside of functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (name for part in node.orelse for name in imports(part, lazy=lazy))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            if lazy:
                yield from imports(node, lazy=lazy)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "kvbudget")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide where a name comes from"
            if node.module is not None and node.module.split(".")[0] == "kvbudget":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in MODULES else node.module
        else:
            yield from imports(node, lazy=lazy)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_what_it_is_for(module: str) -> None:
    summary = (ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8"))) or "").splitlines()
    assert summary and summary[0].endswith((".", ":")), f"{MODULES[module].name} does not open with one sentence"


@pytest.mark.parametrize("module", [module for module in MODULES if room(module)])
def test_imports_go_downwards(module: str) -> None:
    for target in imports(ast.parse(MODULES[module].read_text(encoding="utf-8")), lazy=True):
        assert floor_of(target) <= floor_of(module), f"{module} imports {target} from above"


def test_the_floors_are_those_of_the_house() -> None:
    parts = {room(module) for module in MODULES}
    assert {name for name in FLOOR_OF if name not in parts} <= {"__main__"}


def test_methods_do_not_know_the_cache() -> None:
    for module, path in MODULES.items():
        if room(module) in ("methods", "policy"):
            known = set(imports(ast.parse(path.read_text(encoding="utf-8")), lazy=True))
            assert not {target for target in known if room(target) in ("cache", "enforcer", "attention", "prefill")}


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) == "methods"])
def test_recipes_are_short(module: str) -> None:
    """What a recipe needs beyond a composition is a part, and stands in policy/ (lines without docstrings)."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    assert len([line for line in ast.unparse(tree).splitlines() if line.strip()]) <= 65


def test_no_circular_imports() -> None:
    graph = {
        module: set(imports(ast.parse(path.read_text(encoding="utf-8")), lazy=False))
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle of imports: {' -> '.join((*trail[trail.index(module) :], module))}"
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_importing_adds_one_name_to_transformers_and_changes_nothing() -> None:
    program = """
import importlib, pkgutil, torch
from torch.nn import Module
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions, PreTrainedModel
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.models.llama import modeling_llama

watched = [Module, PreTrainedModel, Cache, DynamicCache, GenerationMixin, modeling_llama, torch.nn.functional]
before = [dict(functions), dict(masks), *[dict(vars(item)) for item in watched]]
hooks = torch.nn.modules.module
counts = [len(getattr(hooks, name)) for name in dir(hooks) if name.startswith("_global") and name.endswith("hooks")]
import kvbudget
for found in pkgutil.walk_packages(kvbudget.__path__, "kvbudget."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
after = [dict(functions), dict(masks), *[dict(vars(item)) for item in watched]]
assert counts == [len(getattr(hooks, n)) for n in dir(hooks) if n.startswith("_global") and n.endswith("hooks")]
for old, new in zip(before[:2], after[:2]):
    assert new.pop("kvbudget") is not None
for old, new in zip(before, after):
    assert old.keys() == new.keys(), set(old) ^ set(new)
    assert all(old[name] is new[name] for name in old), [name for name in old if old[name] is not new[name]]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
