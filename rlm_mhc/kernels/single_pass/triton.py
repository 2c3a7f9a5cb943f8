"""The forwards of `single_pass`: the kernels of `mix_pre`, the first of which is told what aggregates and does it while
it reads."""

from typing import Any

from torch import Tensor

from rlm_mhc.kernels.mix_post_pre import triton as mix_post_pre
from rlm_mhc.kernels.mix_pre import triton as mix_pre


def pre(x: Tensor, given: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """As `mix_pre`'s, the aggregate being by `given [tokens, n]`."""
    return mix_pre.forward(x, *rest, given=given)


def post_pre(x: Tensor, output: Tensor, post: Tensor, res: Tensor, given: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """As `mix_post_pre`'s, the aggregate being by `given [tokens, n]`."""
    return mix_post_pre.forward(x, output, post, res, *rest, given=given)
