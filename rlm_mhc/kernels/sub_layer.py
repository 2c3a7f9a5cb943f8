"""The mixing around a sub-layer by the operations that the program calls, as one differentiable function.

The program (`rlm_mhc/program/mixing.py`) goes back through the combine and the mappings in another way than the fused
ops do by themselves. This is that way with an output that is given: for tests, the self-test and the benchmark.
"""

from typing import Any

from torch import Tensor

from rlm_mhc.kernels.joined import Halves, joined
from rlm_mhc.kernels.mix_post.op import mix_post
from rlm_mhc.kernels.mix_pre import Settings, Weights
from rlm_mhc.kernels.mixing import MIXING


def _halves(name: str, early: bool) -> Halves:
    def forward(settings: Any, streams: Tensor, output: Tensor, *rest: Tensor) -> Any:
        given, weights = (rest[0], rest[1:]) if early else (None, rest)
        _, (normed, pre, post, res, *kept) = MIXING.forward(streams, weights, settings, given, None)
        mixed = mix_post(streams, output, post, res)
        return normed, mixed, pre, post, res, *kept

    def backward(settings: Any, inputs: Any, outputs: Any, cotangents: Any) -> Any:
        streams, output, *rest = inputs
        given, weights = (rest[0], rest[1:]) if early else (None, rest)
        normed, _, pre, post, res, *kept = outputs
        g_normed, g_mixed, *g_early = cotangents
        g_output, g_post, g_res = MIXING.reduce(streams, output, post, g_mixed)
        g_mapped = (g_normed, g_early[0] if early else None, g_post, g_res)
        mapped = (normed, pre, post, res, *kept)
        g_x, g_weights, g_given = MIXING.backward(streams, weights, settings, given, mapped, g_mapped, g_mixed, res)
        return g_x, g_output, *((g_given,) if early else ()), *g_weights

    return Halves(name, 6 + early, 2 + early, forward, backward)


PLAIN, EARLY = _halves("sub_layer", False), _halves("single_pass_sub_layer", True)


def sub_layer(streams: Tensor, output: Tensor, weights: Weights, settings: Settings) -> tuple[Tensor, Tensor]:
    """`(normed, mixed)`: what a sub-layer reads, and the streams after it, its output being given.

    Args:
        streams: `[*b, n, c]` in bf16, fp16 or fp32, n from 1 to 16, c a multiple of 16.
        output: `[*b, c]`, of the same dtype.
        weights: see `Weights`.
        settings: see `Settings`.

    Raises:
        ValueError: as `mix_pre` and `mix_post`.
    """
    return joined(PLAIN, settings, (streams, output, *weights))


def single_pass_sub_layer(
    streams: Tensor, output: Tensor, given: Tensor, weights: Weights, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sub_layer`, aggregated by `given [*b, n]` in fp32; after `mixed` comes `pre`, for the next sub-layer."""
    return joined(EARLY, settings, (streams, output, given, *weights))
