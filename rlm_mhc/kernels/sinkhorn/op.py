"""`fn.sinkhorn_knopp` and the gradient of its finite iteration, as one library op each on the CPU.

See README.md beside this file for the derivation. Neither has a derivative of its own; `stage.py` joins them.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from rlm_mhc.fn.layout import packed, require_shape
from rlm_mhc.kernels.native import load_native

SOURCE = Path(__file__).with_name("cpu.cpp")
NAMESPACE = "rlm_mhc"
LARGEST_NATIVE_N, LARGEST_NATIVE_ITERS = 32, 1000
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define("sinkhorn(Tensor logits, int num_iters, float eps) -> Tensor")
_library.define("sinkhorn_backward(Tensor logits, Tensor cotangent, int num_iters, float eps) -> Tensor")


def sinkhorn(logits: Tensor, num_iters: int, eps: float = 0.0) -> Tensor:
    """`fn.sinkhorn_knopp(logits)` for logits `[*b, n, n]` in fp32 or fp64.

    Raises:
        ValueError: on another dtype or shape, fewer than one iteration or a negative `eps`.
    """
    _check(logits, logits, num_iters, eps)
    # On a GPU the plain operations are traced and fused by the compiler; on a CPU that takes it most of a minute.
    return torch.ops.rlm_mhc.sinkhorn(logits, num_iters, eps) if logits.is_cpu else plain(logits, num_iters, eps)


def sinkhorn_backward(logits: Tensor, cotangent: Tensor, num_iters: int, eps: float = 0.0) -> Tensor:
    """The cotangent of the logits, from that of the matrices, of the same shape and dtype; errors as `sinkhorn`."""
    _check(logits, cotangent, num_iters, eps)
    if not logits.is_cpu:
        return plain_backward(logits, cotangent, num_iters, eps)
    return torch.ops.rlm_mhc.sinkhorn_backward(logits, cotangent, num_iters, eps)


def _check(logits: Tensor, cotangent: Tensor, num_iters: int, eps: float) -> None:
    shape, dtype = tuple(logits.shape), logits.dtype
    if dtype not in (torch.float32, torch.float64) or len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 1:
        raise ValueError(f"logits {dtype} {list(shape)}: expected fp32 or fp64, [*b, n, n] with n of at least 1")
    require_shape("cotangent", cotangent, logits.device, shape, dtype)
    if num_iters < 1:
        raise ValueError(f"num_iters={num_iters}: expected at least 1")
    if eps < 0:
        raise ValueError(f"eps={eps}: expected no negative number")


def _first_pair(logits: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Columns then rows, tokens last: the outcome of each. On logarithms, or where every entry has `eps` added not."""
    limit = torch.finfo(logits.dtype).max / 4
    columns = logits.clamp(-limit, limit).log_softmax(0)
    if not eps:
        return columns.exp(), columns.log_softmax(1).exp_()
    columns = columns.exp_()
    shifted = columns + eps
    return columns, shifted.div_(shifted.sum(1, keepdim=True) + eps)


def _forward(logits: Tensor, num_iters: int, eps: float) -> Tensor:
    m = _first_pair(logits, eps)[1]
    for _ in range(num_iters - 1):
        m.div_(m.sum(0, keepdim=True).add_(eps))
        m.div_(m.sum(1, keepdim=True).add_(eps))
    return m


def _backward(logits: Tensor, cotangent: Tensor, num_iters: int, eps: float) -> Tensor:
    columns, m = _first_pair(logits, eps)
    tape = [(m, 1)]
    for _ in range(num_iters - 1):
        for axis in (0, 1):
            m = m / m.sum(axis, keepdim=True).add_(eps)
            tape.append((m, axis))
    g = cotangent * m
    for m, axis in reversed(tape):
        g.addcmul_(m, g.sum(axis, keepdim=True), value=-1)
    if eps:
        g.mul_(columns / (columns + eps))
    g.addcmul_(columns, g.sum(0, keepdim=True), value=-1)
    limit = torch.finfo(logits.dtype).max / 4
    return torch.where(logits.abs() > limit, 0.0, g)


def _tokens_last(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:]).permute(1, 2, 0).contiguous()


def _tokens_first(x: Tensor, like: Tensor) -> Tensor:
    return x.permute(2, 0, 1).reshape(like.shape).contiguous()


def plain(logits: Tensor, num_iters: int, eps: float = 0.0) -> Tensor:
    """`sinkhorn` by operations of PyTorch, for any device."""
    return _tokens_first(_forward(_tokens_last(logits), num_iters, eps), logits)


def plain_backward(logits: Tensor, cotangent: Tensor, num_iters: int, eps: float = 0.0) -> Tensor:
    """`sinkhorn_backward` by operations of PyTorch, for any device."""
    return _tokens_first(_backward(_tokens_last(logits), _tokens_last(cotangent), num_iters, eps), logits)


def _sinkhorn(logits: Tensor, num_iters: int, eps: float) -> Tensor:
    out = _native(logits, None, num_iters, eps)
    return plain(logits, num_iters, eps) if out is None else out


def _sinkhorn_backward(logits: Tensor, cotangent: Tensor, num_iters: int, eps: float) -> Tensor:
    out = _native(logits, cotangent, num_iters, eps)
    return plain_backward(logits, cotangent, num_iters, eps) if out is None else out


def _native(logits: Tensor, cotangent: Tensor | None, num_iters: int, eps: float) -> Tensor | None:
    # Again, since the op can be called by its name alone: what follows trusts sizes and dtypes.
    _check(logits, logits if cotangent is None else cotangent, num_iters, eps)
    n = logits.shape[-1]
    small = n <= LARGEST_NATIVE_N and num_iters <= LARGEST_NATIVE_ITERS  # its memory grows with both
    library = load_native(SOURCE) if small else None
    if library is None:
        return None
    run = library.sinkhorn_float if logits.dtype == torch.float32 else library.sinkhorn_double
    logits = packed(logits)
    cotangent = None if cotangent is None else packed(cotangent)
    out = torch.empty_like(logits)
    given = None if cotangent is None else ctypes.c_void_p(cotangent.data_ptr())
    tokens = ctypes.c_int64(logits.numel() // (n * n))
    pointers = (ctypes.c_void_p(logits.data_ptr()), given, ctypes.c_void_p(out.data_ptr()))
    run(*pointers, tokens, n, num_iters, ctypes.c_double(eps))
    return out


def _fake(logits: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_library.impl("sinkhorn", _sinkhorn, "CompositeExplicitAutograd")
_library.impl("sinkhorn_backward", _sinkhorn_backward, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::sinkhorn", _fake)
torch.library.register_fake(f"{NAMESPACE}::sinkhorn_backward", _fake)
