"""Checks and copies for operations called directly (aten, fused, C++, Triton): shape, dtype, strides, aliasing.

An ordinary operation of PyTorch takes tensors of any strides. One called directly checks neither strides nor sizes:
another layout gives wrong numbers, another size reads out of bounds.

| operation | sizes, dtype and device | memory |
|---|---|---|
| AdamW, fused | all as the weight's: `require_shape` | one order, no gaps: `packed`; in place, not shared: `overlap` |
| aten attention, flash-attn | `require_heads` | adjacent entries along the last axis: `rows`, `packed` |
| C++ Sinkhorn | `require_shape` | contiguous: `packed` |
| Triton kernels | `require_shape` | contiguous from a multiple of 16 bytes on: `aligned`, `flat` |
| `embedding_dense_backward` | rows in fp32 or wider, since it sums in their dtype | contiguous: `packed` |
| norm of one leaf (`clip`) | any | contiguous, summed by blocks: `packed` |
| cache written in place (`donate=True`) | as `init_cache` makes them | not shared: `overlap` |
| `foreach` in place | of one list, made by one function | not shared: `unshared` |
"""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

ALIGNMENT = 16
WITH_MEMORY = (Tensor, torch.nn.Parameter)  # others, of transforms or fake ones, show no memory
AnyTensor = Shaped[Tensor, "..."]


def require_shape(name: str, x: AnyTensor, device: torch.device, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Refuse a tensor of another shape or dtype, or on another device.

    Raises:
        ValueError: naming it, what it is and what is expected.
    """
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}: expected {device}, as the others")
    if tuple(x.shape) != tuple(shape) or x.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} {x.dtype} {list(x.shape)}: expected {expected} {list(shape)}")


def require_entries(name: str, x: AnyTensor) -> None:
    """Refuse a tensor without entries.

    Raises:
        ValueError: with its shape.
    """
    if not x.numel():
        raise ValueError(f"{name} {list(x.shape)}: expected at least one sequence and one token")


def require_heads(q: AnyTensor, k: AnyTensor, v: AnyTensor) -> None:
    """Refuse what is not `q [*b, h, s, d]`, `k, v [*b, kv, s, d]` with h a multiple of kv, or has no entries.

    Raises:
        ValueError: naming what is wrong, its shape and what is expected.
    """
    require_entries("queries", q)
    group = k.shape[-3] if k.dim() == q.dim() else 1
    if not group or q.shape[-3] % group:
        raise ValueError(f"{q.shape[-3]} query heads, {group} key heads: expected a multiple of the key heads")
    for name, x in (("keys", k), ("values", v)):
        require_shape(name, x, q.device, (*q.shape[:-3], group, *q.shape[-2:]), q.dtype)


def packed(x: AnyTensor) -> AnyTensor:
    """`x`, or a copy where it is not contiguous.

    >>> packed(torch.ones(1).expand(3)).stride()
    (1,)
    """
    return x.contiguous()


def rows(x: AnyTensor) -> AnyTensor:
    """`x`, or a copy where the entries along its last axis are not adjacent."""
    return x if x.stride(-1) == 1 else x.contiguous()


def flat(x: AnyTensor, axes: int) -> AnyTensor:
    """Merge all axes before the last `axes` into one of tokens, `aligned`."""
    return aligned(x.reshape(-1, *x.shape[x.dim() - axes :]))


def aligned(x: AnyTensor) -> AnyTensor:
    """`x`, or a copy where it is not contiguous, or begins off 16 bytes, for which Triton would compile anew."""
    x = packed(x)
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def unshared(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors, copied if any of them share memory."""
    return tuple(x.clone() for x in tensors) if overlap(tensors) else tuple(tensors)


def overlap(written: Sequence[Tensor], read: Sequence[Tensor] = ()) -> tuple[int, int] | None:
    """Return the indices, into `[*written, *read]`, of two tensors that share memory; `(i, i)` if tensor i overlaps
    itself; None if there are none.

    Tensors of `read` may share memory with one another. Tensors without memory (meta, fake) share none.

    >>> x = torch.zeros(4)
    >>> overlap([x[:2], x[2:]]), overlap([x[:3], torch.zeros(2), x[2:]]), overlap([x[:1].expand(2)])
    (None, (0, 2), (0, 0))
    """
    tensors = [*written, *read]
    places = [place for place, x in enumerate(tensors) if type(x) in WITH_MEMORY and not x.is_meta and x.numel()]
    spans = sorted(_span(tensors[place], place) for place in places)
    for place in places:
        if place < len(written) and not tensors[place].is_contiguous() and _overlaps_itself(tensors[place]):
            return place, place
    if all(before[1] <= after[0] for before, after in itertools.pairwise(spans)):
        return None
    reached: list[tuple[int, int, int]] = []
    for span in spans:
        reached = [other for other in reached if other[1] > span[0]]
        for other in reached:
            one, two = sorted((other, span), key=lambda it: it[2])
            if one[2] < len(written) and _shares(tensors[one[2]], tensors[two[2]], one, two):
                return one[2], two[2]
        reached.append(span)
    return None


def _span(x: Tensor, place: int) -> tuple[int, int, int]:
    """Return (first address, end address, index)."""
    if x.is_contiguous():
        size = x.numel()
    else:
        size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    start = x.data_ptr()
    return start, start + size * x.element_size(), place


def _overlaps_itself(x: Tensor) -> bool:
    """Return whether two indices may address one entry: some stride does not exceed the reach of the smaller ones."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _shares(a: Tensor, b: Tensor, of_a: tuple[int, int, int], of_b: tuple[int, int, int]) -> bool:
    """Return whether two tensors whose address ranges intersect share an entry; two columns of a matrix do not."""
    size = a.element_size()
    start, end = min(of_a[0], of_b[0]), max(of_a[1], of_b[1])
    if (a.is_contiguous() and b.is_contiguous()) or b.element_size() != size or (of_a[0] - of_b[0]) % size:
        return True
    taken = torch.zeros((end - start) // size, dtype=torch.bool, device=a.device)
    taken.as_strided(a.shape, a.stride(), (of_a[0] - start) // size).fill_(True)
    return bool(taken.as_strided(b.shape, b.stride(), (of_b[0] - start) // size).any())
