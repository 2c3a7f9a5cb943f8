"""The forward of `mix_post_pre`: the kernels of `mix_pre`, the first of which combines what it reads."""

from typing import Any

from torch import Tensor

from rlm_mhc.kernels.mix_post.triton import combine
from rlm_mhc.kernels.mix_pre import triton as mix_pre
from rlm_mhc.kernels.mix_pre.tiling import MOST_AT_ONCE


def forward(x: Tensor, output: Tensor, post: Tensor, res: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, ...]:
    """As `mix_pre`'s of the combined streams; with more of them than registers hold, the combine is its own kernel."""
    if x.shape[1] > MOST_AT_ONCE:
        return mix_pre.forward(combine(x, output, post, res), *rest, **options)
    return mix_pre.forward(x, *rest, combined=(output, post, res), **options)
