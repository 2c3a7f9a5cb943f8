"""`fn.sinkhorn_knopp` and the gradient of its finite iteration, tokens last, as one library op each on the CPU.

See README.md beside this file for the derivation.
"""

import torch
from torch import Tensor

NAMESPACE = "rlm_mhc"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define("sinkhorn(Tensor logits, int num_iters) -> Tensor")
_library.define("sinkhorn_backward(Tensor logits, Tensor cotangent, int num_iters) -> Tensor")


def sinkhorn(logits: Tensor, num_iters: int) -> Tensor:
    """`fn.sinkhorn_knopp(logits)` for logits `[*b, n, n]` in fp32 or fp64."""
    return torch.ops.rlm_mhc.sinkhorn(logits, num_iters)


def sinkhorn_backward(logits: Tensor, cotangent: Tensor, num_iters: int) -> Tensor:
    """The cotangent of the logits, from that of the matrices; nothing but the logits is kept for it."""
    return torch.ops.rlm_mhc.sinkhorn_backward(logits, cotangent, num_iters)


def _first_pair(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Columns then rows on logarithms, tokens last: the logarithms after the columns and after the rows."""
    limit = torch.finfo(logits.dtype).max / 4
    columns = logits.clamp(-limit, limit).log_softmax(0)
    return columns, columns.log_softmax(1)


def _forward(logits: Tensor, num_iters: int) -> Tensor:
    m = _first_pair(logits)[1].exp()
    for _ in range(num_iters - 1):
        m = m / m.sum(0, keepdim=True)
        m = m / m.sum(1, keepdim=True)
    return m


def _backward(logits: Tensor, cotangent: Tensor, num_iters: int) -> Tensor:
    columns, rows = _first_pair(logits)
    first = m = rows.exp()
    tape = []
    for _ in range(num_iters - 1):
        for axis in (0, 1):
            total = m.sum(axis, keepdim=True)
            m = m / total
            tape.append((m, total, axis))
    g = cotangent
    for m, total, axis in reversed(tape):
        g = (g - (g * m).sum(axis, keepdim=True)) / total
    g = g * first
    g = g - first * g.sum(1, keepdim=True)
    g = g - columns.exp() * g.sum(0, keepdim=True)
    limit = torch.finfo(logits.dtype).max / 4
    return torch.where(logits.abs() <= limit, g, 0.0)


def _tokens_last(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:]).permute(1, 2, 0).contiguous()


def _tokens_first(x: Tensor, like: Tensor) -> Tensor:
    return x.permute(2, 0, 1).reshape(like.shape).contiguous()


def _sinkhorn(logits: Tensor, num_iters: int) -> Tensor:
    return _tokens_first(_forward(_tokens_last(logits), num_iters), logits)


def _sinkhorn_backward(logits: Tensor, cotangent: Tensor, num_iters: int) -> Tensor:
    return _tokens_first(_backward(_tokens_last(logits), _tokens_last(cotangent), num_iters), logits)


def _fake(logits: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_library.impl("sinkhorn", _sinkhorn, "CompositeExplicitAutograd")
_library.impl("sinkhorn_backward", _sinkhorn_backward, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::sinkhorn", _fake)
torch.library.register_fake(f"{NAMESPACE}::sinkhorn_backward", _fake)
