"""Hyper-connections of transformers' DeepSeek-V4, as the preset `deepseek_v4` takes them."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rlm_mhc.params import MHCHead, MHCParams

SITE, HEAD = ("fn", "base", "scale"), ("hc_fn", "hc_base", "hc_scale")


def mhc_from_deepseek_v4(weights: Mapping[str, Tensor]) -> MHCParams | MHCHead:
    """`MHCParams` from the weights of a `DeepseekV4HyperConnection`, `MHCHead` from those of a `DeepseekV4HyperHead`.

    Theirs are `fn [2n+n², n·c]`, `base`, `scale` (`hc_fn [n, n·c]`, `hc_base`, `hc_scale`). Their `comb` maps rows to
    columns and is applied transposed; ours maps columns to rows: the last `n²` outputs change place accordingly.

    Args:
        weights: a `state_dict()` of one of the two modules.

    Returns:
        Tensors of their own, in the dtypes of the given ones.

    Raises:
        ValueError: on other names or shapes.

    Source: transformers, `modeling_deepseek_v4.py`.

    >>> weights = {"fn": torch.zeros(8, 6), "base": torch.arange(8.0), "scale": torch.ones(3)}
    >>> mhc_from_deepseek_v4(weights).bias
    tensor([0., 1., 2., 3., 4., 6., 5., 7.])
    """
    kind = next((names for names in (SITE, HEAD) if set(weights) == set(names)), None)
    if kind is None:
        raise ValueError(f"weights {sorted(weights)}: expected {', '.join(SITE)} or {', '.join(HEAD)}")
    matrix, base, scale = (weights[name].detach() for name in kind)
    n = math.isqrt(len(base) + 1) - 1 if kind is SITE else len(base)
    size = 2 * n + n * n if kind is SITE else n
    wanted = {"base": (size,), "scale": (3,) if kind is SITE else (1,)}
    if n < 1 or matrix.dim() != 2 or len(matrix) != size or matrix.shape[1] % n:
        raise ValueError(f"{kind[0]} {list(matrix.shape)}: expected [{size}, n·c] with n={n}")
    for name, tensor in (("base", base), ("scale", scale)):
        if tuple(tensor.shape) != wanted[name]:
            raise ValueError(f"{kind[SITE.index(name)]} {list(tensor.shape)}: expected {list(wanted[name])}")
    if kind is HEAD:
        return MHCHead(matrix.T.clone(memory_format=torch.contiguous_format), scale.clone(), base.clone())
    turned = torch.arange(n * n, dtype=torch.int64, device=base.device).view(n, n).T.flatten() + 2 * n
    order = torch.cat([torch.arange(2 * n, dtype=torch.int64, device=base.device), turned])
    return MHCParams(matrix[order].T.contiguous(), scale.clone(), base[order])
