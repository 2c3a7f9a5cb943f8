"""The feed-forward sub-layer."""

import torch.nn.functional as F

from rlm_mhc.fn.linear import Map, linear
from rlm_mhc.params import MLP
from rlm_mhc.types import Activations


def swiglu(params: MLP | Map, x: Activations) -> Activations:
    """`down(silu(gate(x)) · up(x))`, or `params(x)` where a function stands in for the weights.

    Source: Shazeer, arXiv 2002.05202; Llama's names.

    >>> import torch; from rlm_mhc import fn, ModelConfig
    >>> fn.swiglu(fn.init(ModelConfig.preset("tiny")).layers[0].mlp, torch.randn(3, 128)).shape
    torch.Size([3, 128])
    """
    if not isinstance(params, MLP):
        return params(x)
    return linear(params.down_proj, F.silu(linear(params.gate_proj, x)) * linear(params.up_proj, x))
