"""The feed-forward sub-layer."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from rlm_mhc.fn.linear import linear
from rlm_mhc.fn.replaceable import replaceable
from rlm_mhc.params import MLP
from rlm_mhc.types import Activations


def swiglu(params: MLP, x: Activations) -> Activations:
    """`down(silu(gate(x)) · up(x))`.

    Source: Shazeer, arXiv 2002.05202; Llama's names.

    >>> import torch; from rlm_mhc import fn, ModelConfig
    >>> fn.swiglu(fn.init(ModelConfig.preset("tiny")).layers[0].mlp, torch.randn(3, 128)).shape
    torch.Size([3, 128])
    """
    return linear(params.down_proj, F.silu(linear(params.gate_proj, x)) * linear(params.up_proj, x))


@replaceable(1)
def mlp(params: MLP, x: Activations, run: Callable[[MLP, Tensor], Tensor] = swiglu) -> Activations:
    """`run(params, x)`; or `params(x)`, see `replaceable`."""
    return run(params, x)
