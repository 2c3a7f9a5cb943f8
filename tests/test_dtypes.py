"""Every tensor that the package makes says its dtype and its device, so that neither `torch.set_default_dtype` nor a
`with torch.device(...)` around a call changes what comes of it.

The exception is what `nn.Parameter` holds: modules are made in the ambient dtype and on the ambient device, as those
of torch and transformers are. `from_pretrained` builds models that way.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

from torch.utils import _device

ROOT = Path(__file__).parents[1]
SOURCES = sorted(file for part in ("rlm_mhc", "recipes") for file in (ROOT / part).rglob("*.py"))
CREATORS = {f"torch.{f.__name__}" for f in _device._device_constructors()}
MODULES = {"nn.Linear", "nn.Embedding"}
MODULES_LIVE_IN = ROOT / "rlm_mhc" / "model"


def ambient_calls(source: str, modules: bool = False) -> list[str]:
    """The calls of a source that leave a dtype or a device to torch's defaults; with `modules` those that make the
    parameters of modules may."""
    return [ast.unparse(call) for call in _calls(ast.parse(source), modules) if _is_ambient(call, modules)]


def _calls(tree: ast.AST, modules: bool) -> Iterator[ast.Call]:
    if isinstance(tree, ast.Call):
        if modules and ast.unparse(tree.func) == "nn.Parameter":
            return
        yield tree
    for child in ast.iter_child_nodes(tree):
        yield from _calls(child, modules)


def _is_ambient(call: ast.Call, modules: bool) -> bool:
    name, said = ast.unparse(call.func), {keyword.arg for keyword in call.keywords}
    if name in CREATORS:
        return None not in said and not said >= {"dtype", "device"}
    if name == "torch.where":  # of two numbers it makes a tensor of the default dtype
        return all(isinstance(branch, ast.Constant) for branch in call.args[1:])
    return name in {"torch.get_default_dtype", "torch.Tensor", "torch.FloatTensor"} | (set() if modules else MODULES)


def test_every_tensor_made_says_its_dtype_and_device():
    found = {
        str(file.relative_to(ROOT)): calls
        for file in SOURCES
        if (calls := ambient_calls(file.read_text(encoding="utf-8"), modules=MODULES_LIVE_IN in file.parents))
    }
    assert found == {}


def test_a_call_that_says_too_little_would_be_found():
    source = """
torch.zeros(3, dtype=torch.float32, device=x.device), torch.ones(2, **options), x.new_zeros(3), torch.where(c, x, 0.0)
torch.zeros(3, dtype=torch.float32), torch.tensor(0, device="cpu"), torch.where(c, 0.5, 1.0)
self.weight = nn.Parameter(torch.ones(3)), nn.Linear(2, 2)
"""
    few = ["torch.zeros(3, dtype=torch.float32)", "torch.tensor(0, device='cpu')", "torch.where(c, 0.5, 1.0)"]
    assert ambient_calls(source) == [*few, "torch.ones(3)", "nn.Linear(2, 2)"]
    assert ambient_calls(source, modules=True) == few
