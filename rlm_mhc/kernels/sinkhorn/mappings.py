"""The mappings of mHC with Sinkhorn as one library op, for compiled code that is to have few and short graphs."""

from typing import Any

from torch import Tensor

from rlm_mhc.fn.mhc import MHCMappings, mhc_mappings, unprojected
from rlm_mhc.kernels.sinkhorn.stage import sinkhorn_knopp
from rlm_mhc.params import MHCParams
from rlm_mhc.variants import preset_named


def mhc_mappings_by_op(
    params: MHCParams, streams: Tensor, *, num_iters: int = 20, eps: float = 1e-6, preset: str = "paper", **options: Any
) -> MHCMappings:
    """`fn.mhc_mappings`, faster on a CPU; another projection than Sinkhorn's is left to it.

    Not for forward mode and second derivatives, as `sinkhorn_knopp` beside it.

    >>> import torch; from rlm_mhc import ModelConfig, fn
    >>> layer = fn.init(ModelConfig.preset("tiny")).layers[0]
    >>> mhc_mappings_by_op(layer.attn_mhc, torch.randn(2, 5, 4, 128)).res.shape
    torch.Size([2, 5, 4, 4])
    """
    n, row = streams.shape[-2], preset_named(preset)
    if (options.get("projection") or row.projection) != "sinkhorn":
        return mhc_mappings(params, streams, num_iters=num_iters, eps=eps, preset=preset, **options)
    pre, post, raw = unprojected(params, streams, eps=eps, preset=preset, projection="sinkhorn")
    res = sinkhorn_knopp(raw.unflatten(-1, (n, n)), num_iters=num_iters, eps=row.eps)
    return MHCMappings(pre, post, res)
