"""What a step reports of mHC, from a few tokens of each layer, on the device: no host waits for it."""

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from rlm_mhc.fn.gain import cumulative_gain, stochasticity_error, stream_dominance

SAMPLED_TOKENS = 64
NETWORK = ("amax_pre", "amax_post", "gain_forward", "gain_backward", "row_error", "column_error", "dominance")
LAYER = ("amax", "gain_forward", "gain_backward", "row_error", "column_error", "dominance")


class Sampled(NamedTuple):
    """At sampled tokens: `res [tokens, n, n]` of each sub-layer, and the dominance `[tokens]` after each layer."""

    res: tuple[Tensor, ...]
    dominance: tuple[Tensor, ...]


def sample(res: tuple[Tensor, ...], streams: Tensor) -> Sampled:
    """Of the `res [*b, n, n]` of a layer and the streams `[*b, n, c]` after it."""
    if not res:
        return Sampled((), ())
    return Sampled(tuple(_spread(x).clone() for x in res), (stream_dominance(_spread(streams)),))


def join(layers: Iterable[Sampled]) -> Sampled:
    """One for all layers, in their order."""
    res, dominance = zip(*layers, strict=True)
    return Sampled(tuple(chain(*res)), tuple(chain(*dominance)))


def mhc_metrics(sampled: Sampled, like: Tensor) -> dict[str, Tensor]:
    """0-d tensors: over all layers `mhc/<name>` of `NETWORK`, and `mhc/<name>/layer_<l>` of `LAYER`; largest values.

    `amax` is the largest entry of `res` (`_pre` at the attention, `_post` at the MLP sites), gains are those of
    `fn.cumulative_gain` (of a layer: up to it forward, from it backward), errors those of `fn.stochasticity_error`,
    `dominance` is `fn.stream_dominance` after a layer. Without mHC the residual is the identity: the first four are 1,
    and there are no others.
    """
    if not sampled.res:
        return dict.fromkeys((f"mhc/{name}" for name in NETWORK[:4]), torch.ones_like(like))
    res = torch.stack(sampled.res)
    sites = torch.stack([*cumulative_gain(res), *stochasticity_error(res), res.abs().amax((-1, -2))]).amax(-1)
    forward, backward, rows, columns, amax = sites.unflatten(-1, (-1, 2)).unbind()
    dominance = torch.stack(sampled.dominance).amax(-1)
    layers = torch.stack([amax.amax(-1), forward[:, 1], backward[:, 0], rows.amax(-1), columns.amax(-1), dominance])
    # The last layer's forward gain and the first one's backward gain are those of the whole network.
    network = [*amax.amax(0), forward[-1, 1], backward[0, 0], *layers[3:].amax(-1)]
    by_layer = {
        f"mhc/{name}/layer_{number}": value
        for name, values in zip(LAYER, layers.unbind(), strict=True)
        for number, value in enumerate(values.unbind())
    }
    return {f"mhc/{name}": value for name, value in zip(NETWORK, network, strict=True)} | by_layer


def _spread(x: Tensor) -> Tensor:
    """At most about `SAMPLED_TOKENS` of the matrices `[*b, n, m]`, spread evenly over the tokens."""
    flat = x.flatten(0, -3)
    return flat[:: max(1, len(flat) // SAMPLED_TOKENS)]
