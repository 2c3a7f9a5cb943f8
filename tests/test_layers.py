"""The layers of the package import only from those above them, and importing it starts nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rlm_mhc

ROOT = Path(rlm_mhc.__file__).parent
LAYERS = [
    ("validation", "variants", "disk"),
    ("types", "config"),
    ("tree", "params"),
    ("fn",),
    ("stage",),
    ("kernels",),
    ("program",),
    ("parallel",),
    ("data",),
    ("checkpoint", "convert"),
    ("train",),
    ("model",),
    ("rlm",),
    ("testing",),
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
HEAVY = ("transformers", "datasets", "hydra", "wandb", "matplotlib", "triton", "tokenizers", "safetensors")


def modules():
    return [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


def imported_layers(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("rlm_mhc"):
            rest = node.module.split(".")[1:]
            names |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("rlm_mhc.")}
    return names & set(LEVEL)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_layer_imports_only_from_those_above_it(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    below = {name for name in imported_layers(path.read_text()) if LEVEL[name] > LEVEL[own]}
    assert not below, f"{path} is of layer {own} and imports {below}"


def test_a_wrong_import_would_be_found():
    assert imported_layers("from rlm_mhc.train.loop import train\nfrom rlm_mhc import fn") == {"train", "fn"}


@pytest.mark.parametrize("name", ["rlm_mhc", "rlm_mhc.fn"])
def test_import_loads_nothing_heavy(name):
    code = f"import sys, {name}; print([m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert out.stdout.strip() == "[]"


def test_each_file_stays_under_300_lines():
    assert {str(p): n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 300} == {}
