"""The import rule: imports run downwards only, and few layers may import transformers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import wise_ext

PACKAGE = Path(wise_ext.__file__).parent
ROOT = PACKAGE.parent
# From the bottom up. The Triton kernels lie in kernels/triton and are installed into the package.
LAYERS = (
    "triton_kernels",
    "ops",
    "memory",
    "nn",
    "models",
    "storage",
    "editing",
    "evaluation",
    "integrations",
    "cli",
)
# Single modules beside the layers: the rank of the highest layer each may import, -1 for none.
MODULES = {"errors": -1, "_version": -1, "_build_plan": -1, "_build_info": -1, "diagnostics": 1}
TRITON_IN = {"triton_kernels"}
TRANSFORMERS_IN = {"models", "editing", "evaluation", "integrations", "cli"}
KERNELS = ROOT / "kernels" / "triton"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Absolute dotted names that a module imports anywhere, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                keep = len(parents) - node.level + (1 if is_package else 0)
                base = ".".join([*parents[:keep], *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            first = node.args[0]
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield str(first.value)


def part_of(name: str) -> str | None:
    """The layer or single module a dotted name of wise_ext belongs to."""
    parts = name.split(".")
    if len(parts) < 2 or parts[0] != "wise_ext":
        return None
    return parts[1] if parts[1] in LAYERS or parts[1] in MODULES else None


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Everything in `source` that the rule forbids `module` to import."""
    here = part_of(module)
    if here is None:
        # The package's own __init__ and __main__: the public face, lazy by the test below.
        return []
    rank = LAYERS.index(here) if here in LAYERS else MODULES[here]
    wrong = []
    for name in imported(ast.parse(source), module, is_package):
        top, there = name.split(".")[0], part_of(name)
        stranger = (top == "triton" and here not in TRITON_IN) or (
            top == "transformers" and here not in TRANSFORMERS_IN
        )
        upwards = there in LAYERS and LAYERS.index(there) > rank
        report = there == "diagnostics" and here not in ("cli", "diagnostics")
        # Every other layer goes through the ops.
        kernels = there == "triton_kernels" and here not in ("triton_kernels", "ops")
        if stranger or upwards or report or kernels:
            wrong.append(name)
    return wrong


def dotted(path: Path) -> str:
    if path.is_relative_to(KERNELS):
        path = PACKAGE / "triton_kernels" / path.relative_to(KERNELS)
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", SOURCES, ids=dotted)
def test_imports_run_downwards(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert not violations(source, dotted(path), path.name == "__init__.py")


def test_every_source_belongs_to_a_layer() -> None:
    strays = {dotted(path) for path in SOURCES if part_of(dotted(path)) is None}
    assert strays == {"wise_ext", "wise_ext.__main__"}


def test_every_folder_is_a_package() -> None:
    # One without __init__.py works in a source tree and is left out of the wheel.
    bare = {path.parent for path in SOURCES if not (path.parent / "__init__.py").exists()}
    assert not bare


@pytest.mark.parametrize(
    ("source", "module", "wrong"),
    [
        ("import wise_ext.memory.bank", "wise_ext.ops.schema", ["wise_ext.memory.bank"]),
        ("import wise_ext.ops", "wise_ext.memory.bank", []),
        ("from ..nn import x", "wise_ext.memory.bank", ["wise_ext.nn", "wise_ext.nn.x"]),
        ("from .. import cli", "wise_ext.ops.schema", ["wise_ext.cli"]),
        ("from wise_ext import editing", "wise_ext.storage.files", ["wise_ext.editing"]),
        ("def f():\n    import transformers.cache", "wise_ext.nn.dual", ["transformers.cache"]),
        ("import transformers", "wise_ext.models.table", []),
        ("import triton.language", "wise_ext.ops.backends", ["triton.language"]),
        ("import triton.language", "wise_ext.triton_kernels.configs", []),
        ("import_module('wise_ext.triton_kernels')", "wise_ext.ops.backends", []),
        ("import wise_ext.triton_kernels", "wise_ext.memory.bank", ["wise_ext.triton_kernels"]),
        ("from wise_ext import ops", "wise_ext.triton_kernels.configs", ["wise_ext.ops"]),
        ("import_module('wise_ext.cli.app')", "wise_ext.editing.wise", ["wise_ext.cli.app"]),
        ("from wise_ext.errors import WiseError", "wise_ext.ops.checks", []),
        ("from wise_ext import ops", "wise_ext.errors", ["wise_ext.ops"]),
        ("from wise_ext import diagnostics", "wise_ext.nn.dual", ["wise_ext.diagnostics"]),
        ("from wise_ext import diagnostics, ops", "wise_ext.cli.app", []),
    ],
)
def test_the_rule_catches_what_it_should(source: str, module: str, wrong: list[str]) -> None:
    assert violations(source, module) == wrong


def test_relative_imports_of_a_package_are_its_own() -> None:
    assert not violations("from .bank import PackedBank", "wise_ext.memory", is_package=True)
    assert violations("from ..nn import x", "wise_ext.memory", is_package=True)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "modules",
    [
        "wise_ext",
        "wise_ext, wise_ext.errors, wise_ext.ops, wise_ext.memory, wise_ext.nn",
    ],
)
def test_importing_stays_light(modules: str) -> None:
    answer = run(
        f"import sys, {modules}\n"
        "heavy = {'transformers', 'triton', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "torch = sys.modules.get('torch')\n"
        "assert torch is None or not torch.cuda.is_initialized()\n"
    )
    assert answer.returncode == 0, answer.stderr


def test_public_names_match_their_declarations() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    declared = {
        alias.name: node.module
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == wise_ext._LAZY
    assert set(declared) <= set(wise_ext.__all__)
    assert len(set(wise_ext.__all__)) == len(wise_ext.__all__)


@pytest.mark.parametrize("name", wise_ext.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(wise_ext, name)
    assert name in dir(wise_ext)
    assert name.startswith("__") or value.__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'wise_ext' has no attribute 'edit_all'"):
        _ = wise_ext.edit_all  # type: ignore[attr-defined]


def test_kernels_is_no_importable_package() -> None:
    # A top-level package of that name would shadow the one transformers looks for.
    assert not (ROOT / "kernels" / "__init__.py").exists()
