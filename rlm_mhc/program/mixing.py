"""A block mixed by `kernels.mixing` as a stage: between its sub-layers one operation combines and maps.

    pre | attention | post and pre | MLP | post

Across blocks the mixing is not fused: a block ends in its combined streams, which `remat` stores and monitors read.
The backward of a sub-layer needs its combine's cotangent of the streams only together with that of its mappings, so
that `mixing.backward` gets `more` and `res` and makes both in one pass.
"""

from typing import Any, NamedTuple

from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.kernels import Mixing
from rlm_mhc.fn.mhc import EarlyPre, MHCMappings
from rlm_mhc.params import MHCParams
from rlm_mhc.program.hyper import HyperKept
from rlm_mhc.stage import Grads, Stage, Weights
from rlm_mhc.variants import PRESETS


class Site(NamedTuple):
    """A sub-layer: its mHC's name, the name of the norm before it, and the rest of it as a stage."""

    name: str
    norm: str
    branch: Stage

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of phi, alpha, bias and the norm's weight."""
        return (*(f"{self.name}.{field}" for field in MHCParams._fields), self.norm)


def mixed_block(first: Site, second: Site, config: ModelConfig, mixing: Mixing, keep_streams: bool) -> Stage:
    """The stage of two sub-layers, which keeps what `chain` of two `hyper` keeps, and the normed inputs.

    Where `pre` comes early, the input and the output are an `EarlyPre`.
    """
    settings = mixing.settings(config)
    early = PRESETS[config.mhc_preset].early_pre

    def site_forward(
        site: Site, weights: Weights, streams: Tensor, given: Any, combined: Any = None
    ) -> tuple[Tensor, HyperKept]:
        own = [weights[name] for name in site.weights]
        streams, mapped = mixing.forward(streams, own, settings, given, combined)
        normed, pre, post, res, *rest = mapped
        output, inner = site.branch.forward(weights, normed)
        return streams, HyperKept(MHCMappings(pre, post, res), output, tuple(rest), (normed, inner))

    def forward(weights: Weights, x: Any) -> tuple[Any, Any]:
        streams, given = x if early else (x, None)
        streams, a = site_forward(first, weights, streams, given)
        combined = (a.output, a.mappings.post, a.mappings.res)
        between, b = site_forward(second, weights, streams, a.mappings.pre if early else None, combined)
        return combine(between, b), ((between,) if keep_streams else (), (a, b))

    def site_backward(
        site: Site, weights: Weights, streams: Tensor, given: Any, kept: HyperKept, cotangent: Any
    ) -> tuple[Grads, Any]:
        g_streams, g_next = cotangent if early else (cotangent, None)
        pre, post, res = kept.mappings
        normed, inner = kept.of_branch
        g_output, g_post, g_res = mixing.reduce(streams, kept.output, post, g_streams)
        grads, g_normed = site.branch.backward(weights, normed, inner, g_output)
        own = [weights[name] for name in site.weights]
        mapped = (normed, pre, post, res, *kept.of_mappings)
        cotangents = (g_normed, g_next, g_post, g_res)
        g_x, g_own, g_given = mixing.backward(streams, own, settings, given, mapped, cotangents, g_streams, res)
        grads |= dict(zip(site.weights, g_own, strict=True))
        return grads, EarlyPre(g_x, g_given) if early else g_x

    def backward(weights: Weights, x: Any, kept: Any, cotangent: Any) -> tuple[Grads, Any]:
        streams, given = x if early else (x, None)
        a, b = kept[1]
        if keep_streams:
            (between,) = kept[0]
        else:
            between = mixing.post(streams, a.output, a.mappings.post, a.mappings.res)
        of_second, cotangent = site_backward(second, weights, between, a.mappings.pre if early else None, b, cotangent)
        of_first, cotangent = site_backward(first, weights, streams, given, a, cotangent)
        return of_first | of_second, cotangent

    def combine(streams: Tensor, kept: HyperKept) -> Any:
        pre, post, res = kept.mappings
        mixed = mixing.post(streams, kept.output, post, res)
        return EarlyPre(mixed, pre) if early else mixed

    def replay(x: Any, kept: Any) -> Any:
        streams = x.streams if early else x
        for part in kept[1]:
            hidden = combine(streams, part)
            streams = hidden.streams if early else hidden
        return hidden

    return Stage(forward, backward, replay)
