"""The fused mixing against the reference in float64: outputs and every gradient, for tests and before a run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.mhc import mhc_aggregate, mhc_combine, mhc_mappings
from rlm_mhc.fn.norm import rms_norm
from rlm_mhc.kernels import stages
from rlm_mhc.kernels.launch import require_triton
from rlm_mhc.kernels.mix_pre import Settings
from rlm_mhc.params import MHCParams
from rlm_mhc.validation import in_short
from rlm_mhc.variants import PRESETS

COMBINE, GIVEN, WEIGHTS = ("output", "post", "res"), ("given",), ("phi", "alpha", "bias", "weight")
ARGUMENTS = {
    "mix_post": ("streams", *COMBINE),
    "mix_pre": ("streams", *WEIGHTS),
    "mix_post_pre": ("streams", *COMBINE, *WEIGHTS),
    "single_pass_pre": ("streams", *GIVEN, *WEIGHTS),
    "single_pass_post_pre": ("streams", *COMBINE, *GIVEN, *WEIGHTS),
    "sub_layer": ("streams", "output", *WEIGHTS),
    "single_pass_sub_layer": ("streams", "output", *GIVEN, *WEIGHTS),
}
MAPPED = ("normed", "pre", "post", "res")
OUTPUTS = {
    "mix_post": ("mixed",),
    "mix_pre": MAPPED,
    "mix_post_pre": ("mixed", *MAPPED),
    "single_pass_pre": MAPPED,
    "single_pass_post_pre": ("mixed", *MAPPED),
    "sub_layer": ("normed", "mixed"),
    "single_pass_sub_layer": ("normed", "mixed", "pre"),
}
TOKENS = 67  # which fill no block
LARGEST_ERROR = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def draw(n: int, c: int, tokens: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """Random arguments of all ops by name, on the generator's device."""

    def normal(*shape: int, size: float = 1.0, offset: float = 0.0) -> Tensor:
        return offset + size * torch.randn(*shape, generator=generator, dtype=torch.float32, device=generator.device)

    raw = 2 * n + n * n
    return {
        "streams": normal(tokens, n, c).to(dtype),
        "output": normal(tokens, c).to(dtype),
        "post": normal(tokens, n).sigmoid() * 2,
        "res": normal(tokens, n, n).softmax(-1),
        "given": normal(tokens, n).sigmoid(),
        "phi": normal(n * c, raw, size=(n * c) ** -0.5),
        "alpha": normal(3, offset=1.0),
        "bias": normal(raw),
        "weight": normal(c, size=0.3, offset=1.0).to(dtype),
    }


def draw_inputs(
    name: str, n: int, c: int, tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, Tensor]:
    """Random arguments of an op by name, the same on any device."""
    drawn = draw(n, c, tokens, dtype, torch.Generator().manual_seed(seed))
    return {argument: drawn[argument].to(device) for argument in ARGUMENTS[name]}


STAGES = {
    "mix_pre": (stages.pre_stage, False),
    "mix_post_pre": (stages.post_pre_stage, False),
    "single_pass_pre": (stages.pre_stage, True),
    "single_pass_post_pre": (stages.post_pre_stage, True),
    "sub_layer": (stages.sub_layer_stage, False),
    "single_pass_sub_layer": (stages.sub_layer_stage, True),
}


def fused(name: str, settings: Settings) -> Callable[..., tuple[Tensor, ...]]:
    """The fused op of a name as a function of its arguments in their order."""
    if name == "mix_post":
        return lambda *inputs: (stages.combine(*inputs),)
    make, early = STAGES[name]
    run = stages.function(make(settings, early), name, len(OUTPUTS[name]))
    return lambda *inputs: run(inputs[-4:], *inputs[:-4])


def reference(name: str, settings: Settings, rounded: torch.dtype | None = None) -> Callable[..., tuple[Tensor, ...]]:
    """The same by the functions of `rlm_mhc.fn`, the combined streams being rounded to a dtype."""
    preset = next(key for key, row in PRESETS.items() if row.eps == settings.sinkhorn_eps)

    def stored(mixed: Tensor) -> Tensor:
        return mixed if rounded is None else mixed.to(rounded).to(mixed.dtype)

    def run(streams: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(ARGUMENTS[name][1:], rest, strict=True))
        found: dict[str, Tensor] = {}
        if "post" in named:
            streams = found["mixed"] = stored(mhc_combine(streams, *(named[key] for key in COMBINE)))
        if "phi" in named:
            params = MHCParams(named["phi"], named["alpha"], named["bias"])
            mapped = mhc_mappings(params, streams, num_iters=settings.num_iters, eps=settings.eps, preset=preset)
            u = mhc_aggregate(streams, named.get("given", mapped.pre))
            found |= mapped._asdict() | {"normed": rms_norm(u, named["weight"], settings.eps)}
        if "mixed" not in found and "output" in named:
            found["mixed"] = stored(mhc_combine(streams, named["output"], found["post"], found["res"]))
        return tuple(found[key] for key in OUTPUTS[name])

    return run


def errors(name: str, inputs: dict[str, Tensor], settings: Settings, seed: int = 1) -> dict[str, float]:
    """Of each output and each argument's gradient: the largest error against float64, relative to the largest entry.

    That of `given` with a single stream, whose scale the norm takes away again, is zero and rounding: its error is
    relative to the largest cotangent.
    """
    pullback: Any = torch.func.vjp
    outputs, pull = pullback(fused(name, settings), *inputs.values())
    exact = [x.double() for x in inputs.values()]
    expected, exact_pull = pullback(reference(name, settings, inputs["streams"].dtype), *exact)
    generator = torch.Generator().manual_seed(seed)
    cotangents = tuple(
        torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu").to(x) for x in outputs
    )
    found = dict(zip(OUTPUTS[name], zip(outputs, expected, strict=True), strict=True))
    gradients = zip(pull(cotangents), exact_pull(tuple(g.double() for g in cotangents)), strict=True)
    found |= dict(zip((f"gradient of {key}" for key in inputs), gradients, strict=True))
    least = dict.fromkeys(found, torch.finfo(torch.float32).tiny)
    if inputs["streams"].shape[-2] == 1:
        least["gradient of given"] = max(g.abs().max().item() for g in cotangents)
    return {key: _error(*pair, least[key]) for key, pair in found.items()}


def _error(actual: Tensor, exact: Tensor, least: float) -> float:
    scale = exact.abs().max().clamp(min=least)
    worst = ((actual.double() - exact).abs().max() / scale).item()
    return worst if worst == worst else float("inf")


def self_test(
    device: torch.device, dtype: torch.dtype, settings: Settings, model: ModelConfig | None = None
) -> str | None:
    """What is wrong with the fused ops on a device in a dtype, or None: outputs and gradients of fixed random numbers.

    The sizes and the ops are those that a model runs; without one all ops in awkward sizes.
    """
    n, c = (model.mhc_flows, model.hidden_dim) if model else (3, 80)
    early = model is not None and PRESETS[model.mhc_preset].early_pre
    names = [name for name in ARGUMENTS if not model or name == "mix_post" or name.startswith("single_pass") == early]
    for name in names:
        found = errors(name, draw_inputs(name, n, c, TOKENS, dtype, device), settings)
        worst = max(found, key=lambda key: found[key])
        if not found[worst] <= LARGEST_ERROR[dtype]:
            return f"{name}: {worst} is off by {found[worst]:.1e} of its largest entry"
    return None


def self_test_failure(
    device: torch.device, dtype: torch.dtype, settings: Settings, model: ModelConfig | None = None
) -> str | None:
    """Return what `self_test` finds wrong, or what it raises, in one line; None where the ops are right."""
    try:
        require_triton(device)
        return self_test(device, dtype, settings, model)
    except Exception as error:
        return in_short(error)
