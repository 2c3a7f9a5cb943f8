"""The combine `streams'[i] = Σ_j res[i, j] · streams[j] + post[i] · output` and its backward, as raw library ops.

README.md beside this file derives the backward and counts the bytes. None of them has a derivative of its own;
`rlm_mhc/kernels/stages.py` joins them.
"""

import torch
from torch import Tensor

from rlm_mhc.fn.layout import flat, require_shape
from rlm_mhc.kernels.launch import require_streams, require_triton

_library = torch.library.Library("rlm_mhc", "FRAGMENT")
_library.define("mix_post(Tensor streams, Tensor output, Tensor post, Tensor res) -> Tensor")
_library.define(
    "mix_post_reduce(Tensor streams, Tensor output, Tensor post, Tensor cotangent) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "mix_post_backward(Tensor streams, Tensor output, Tensor post, Tensor res, Tensor cotangent) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def mix_post(streams: Tensor, output: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """`fn.mhc_combine`: streams `[*b, n, c]`, output `[*b, c]` of the same dtype, post and res in fp32.

    Raises:
        ValueError: on another shape or dtype, and where the Triton kernels do not run.
    """
    _check(streams, output, post, res)
    return torch.ops.rlm_mhc.mix_post(streams, output, post, res)


def mix_post_reduce(streams: Tensor, output: Tensor, post: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cotangents of output, post and res, from that of the combined streams; errors as `mix_post`."""
    _check(streams, output, post, cotangent=cotangent)
    return torch.ops.rlm_mhc.mix_post_reduce(streams, output, post, cotangent)


def mix_post_backward(
    streams: Tensor, output: Tensor, post: Tensor, res: Tensor, cotangent: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The cotangents of streams, output, post and res; errors as `mix_post`."""
    _check(streams, output, post, res, cotangent)
    return torch.ops.rlm_mhc.mix_post_backward(streams, output, post, res, cotangent)


def _check(
    streams: Tensor, output: Tensor, post: Tensor, res: Tensor | None = None, cotangent: Tensor | None = None
) -> None:
    require_streams(streams)
    *b, n, c = streams.shape
    require_shape("output", output, streams.device, (*b, c), streams.dtype)
    require_shape("post", post, streams.device, (*b, n), torch.float32)
    if res is not None:
        require_shape("res", res, streams.device, (*b, n, n), torch.float32)
    if cotangent is not None:
        require_shape("cotangent", cotangent, streams.device, (*b, n, c), streams.dtype)


def _mix_post(streams: Tensor, output: Tensor, post: Tensor, res: Tensor) -> Tensor:
    require_triton(streams.device)
    from rlm_mhc.kernels.mix_post.triton import combine

    return combine(flat(streams, 2), flat(output, 1), flat(post, 1), flat(res, 2)).view(streams.shape)


def _mix_post_reduce(streams: Tensor, output: Tensor, post: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
    require_triton(streams.device)
    from rlm_mhc.kernels.mix_post.triton import reduce

    g_output, g_post, g_res = reduce(flat(streams, 2), flat(output, 1), flat(post, 1), flat(cotangent, 2))
    return g_output.view(output.shape), g_post.view(post.shape), g_res.view(*post.shape, post.shape[-1])


def _mix_post_backward(
    streams: Tensor, output: Tensor, post: Tensor, res: Tensor, cotangent: Tensor
) -> tuple[Tensor, ...]:
    require_triton(streams.device)
    from rlm_mhc.kernels.mix_post.triton import reduce

    found = reduce(flat(streams, 2), flat(output, 1), flat(post, 1), flat(cotangent, 2), flat(res, 2))
    return tuple(g.view(x.shape) for g, x in zip(found, (streams, output, post, res), strict=True))


def _empty(x: Tensor, *more: int) -> Tensor:
    return x.new_empty((*x.shape, *more))


_library.impl("mix_post", _mix_post, "CompositeExplicitAutograd")
_library.impl("mix_post_reduce", _mix_post_reduce, "CompositeExplicitAutograd")
_library.impl("mix_post_backward", _mix_post_backward, "CompositeExplicitAutograd")
torch.library.register_fake("rlm_mhc::mix_post", lambda streams, *rest: _empty(streams))
torch.library.register_fake(
    "rlm_mhc::mix_post_reduce",
    lambda streams, output, post, cotangent: (_empty(output), _empty(post), _empty(post, post.shape[-1])),
)
torch.library.register_fake("rlm_mhc::mix_post_backward", lambda *inputs: tuple(_empty(x) for x in inputs[:4]))
