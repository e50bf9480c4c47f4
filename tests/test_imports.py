"""Imports point down, and importing spkv changes nothing and needs nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "spkv"
# Lower layers first; a module may import its own layer and those before it.
LAYERS = [
    {"config", "fingerprint", "outputs"},
    {"gates", "predictor", "ops", "text"},
    {"cache"},
    {"hf"},
    {"checkpoint"},
    {"training", "evals", "inspect", "serving"},
    {"demo"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SIDE_BY_SIDE = {"training", "evals", "inspect", "serving"}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("spkv"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("spkv."))


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: f.relative_to(ROOT).as_posix())
def test_imports_point_down(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    if parts == ("__init__",):
        return
    package = parts[0]
    assert package in RANK, f"say in LAYERS where {package} belongs"
    for imported in imports(file):
        if imported == "__version__":
            continue
        assert RANK[imported] <= RANK[package], f"{package} must not import {imported}"
        if package in SIDE_BY_SIDE and imported in SIDE_BY_SIDE:
            assert imported == package, f"{package} and {imported} must not know each other"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_spkv_loads_nothing_heavy():
    heavy = "{'torch', 'transformers', 'triton', 'vllm', 'peft', 'matplotlib', 'datasets'}"
    assert run(f"import spkv, sys; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_importing_everything_public_changes_no_registry():
    code = (
        "import transformers; from transformers import AttentionInterface as A; before = set(A._global_mapping);"
        "import spkv; [getattr(spkv, n) for n in spkv.__all__]; print(set(A._global_mapping) == before)"
    )
    assert run(code).strip() == "True"


def test_unknown_names_are_attribute_errors():
    import spkv

    with pytest.raises(AttributeError, match="has no attribute 'attch'"):
        _ = spkv.attch
    assert "attach" in dir(spkv)
