"""AdamW as a function of trees."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlm_mhc.fn.layout import overlap, packed, require_shape, unshared
from rlm_mhc.fn.norm import widen
from rlm_mhc.fn.transforms import in_forward_mode, in_transform, is_transformed
from rlm_mhc.tree import named_leaves, rebuild, tree_leaves, tree_map, tree_rows
from rlm_mhc.types import Scalar

Tree = TypeVar("Tree")
Array = Float[Tensor, "*shape"]


class AdamWState(NamedTuple):
    """First and second moments in the structure of the parameters, and the number of updates, a 0-d fp32 tensor."""

    exp_avg: Any
    exp_avg_sq: Any
    step: Tensor


class Hyperparameters(NamedTuple):
    """Hyperparameters of an AdamW update; see `adamw`."""

    lr: float | Tensor
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Leaves(NamedTuple):
    """The leaves of the trees of an update, as lists of the same order."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avg: Sequence[Tensor]
    exp_avg_sq: Sequence[Tensor]


def adamw_init(params: Any) -> AdamWState:
    """Zero moments for a tree of parameters.

    >>> adamw_init((torch.ones(2),)).exp_avg
    (tensor([0., 0.]),)
    """
    device = tree_leaves(params)[0].device
    return AdamWState(
        tree_map(_packed_zeros, params),
        tree_map(_packed_zeros, params),
        torch.zeros((), dtype=torch.float32, device=device),
    )


def adamw(
    params: Tree,
    grads: Tree,
    state: AdamWState,
    decay: Any,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    donate: bool = False,
) -> tuple[Tree, AdamWState]:
    """One update: `p ← p - lr · (m̂ / (sqrt(v̂) + eps) + weight_decay · p)`.

    It runs torch's fused AdamW. Under a transform (`torch.func.grad`, `jvp`, `vmap`), or where an input requires grad,
    and under `torch.compile`, it is computed by the formula, and can be differentiated with respect to every tensor.
    Under `torch.no_grad()` and with `donate` inputs that require grad are updated by the fused one.

    Args:
        params: the tree to update, and `grads` of the same structure.
        grads: its gradients.
        state: of `adamw_init` or the last update.
        decay: a tree of booleans (`fn.decay_mask(config)`): where weight decay applies.
        lr: learning rate, a number or a 0-d tensor.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the gradient.
        grad_scale: divides the gradients first, which fuses clipping and the unscaling of a scaled loss.
        found_inf: 1.0 leaves parameters and state as they are, 0.0 updates them; both 0-d fp32.
        donate: update in place; the arguments, gradients included, must not be used again. Weights and moments must
            not share memory.

    Raises:
        ValueError: when the trees differ in structure, when a gradient or moment differs from its weight in shape,
            dtype or device, and when what is updated in place shares memory.

    Source: Loshchilov & Hutter, arXiv 1711.05101; `torch.optim.adamw.adamw`.

    >>> params, state = adamw((torch.ones(1),), (torch.ones(1),), adamw_init((torch.ones(1),)), (False,), lr=0.1)
    >>> params
    (tensor([0.9000]),)
    """
    rows = tree_rows(params, grads, state.exp_avg, state.exp_avg_sq, decay)
    leaves = Leaves(*([row[part] for row in rows] for part in range(4)))
    rates = [weight_decay if row[4] else 0.0 for row in rows]
    _require_equal(leaves, params)
    hyper = Hyperparameters(lr, betas, eps, grad_scale, found_inf)
    step = state.step + (1 if found_inf is None else 1 - found_inf)
    if _is_differentiated((*(x for column in leaves for x in column), *hyper, state.step), donate):
        given = zip(*leaves, rates, strict=True)
        updated = [adamw_leaf(p, g, m, v, state.step, hyper, rate) for p, g, m, v, rate in given]
    elif donate:
        _require_apart(leaves, params)
        _update_in_place(leaves, rates, state.step, hyper)
        return params, AdamWState(state.exp_avg, state.exp_avg_sq, step)
    else:
        own = _copied(leaves, grads=grad_scale is not None)
        _fused(own, rates, state.step, hyper)
        updated = list(zip(own.params, own.exp_avg, own.exp_avg_sq, strict=True))
    values, exp_avg, exp_avg_sq = (rebuild(params, (row[part] for row in updated)) for part in range(3))
    return values, AdamWState(exp_avg, exp_avg_sq, step)


def adamw_leaf(
    p: Array, g: Array, exp_avg: Array, exp_avg_sq: Array, step: Scalar, hyper: Hyperparameters, weight_decay: float
) -> tuple[Array, Array, Array]:
    """`adamw` of one leaf by the formula, in fp32 or wider: its new value and moments, in the dtypes of the old ones.

    Where the second moment is 0 its root counts as constant, so that the derivative is finite.

    >>> adamw_leaf(*[torch.ones(1)] * 2, *[torch.zeros(1)] * 2, torch.tensor(0.0), Hyperparameters(lr=0.1), 0.0)[0]
    tensor([0.9000])
    """
    old = p, exp_avg, exp_avg_sq
    p, g, m, v = (widen(x) for x in (p, g, exp_avg, exp_avg_sq))
    lr, (beta1, beta2), eps, grad_scale, found_inf = hyper
    if grad_scale is not None:
        g = g / grad_scale
    if found_inf is not None:
        # The branch that `where` discards below must be finite too, or its derivative is NaN.
        g = torch.where(found_inf > 0, 0.0, g)
    done = step.double() + 1
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g.square()
    root = torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), 0.0) / (1 - beta2**done).sqrt()
    p = p * (1 - lr * weight_decay) - lr / (1 - beta1**done) * (m / (root + eps))
    new = [x.to(before.dtype) for x, before in zip((p, m, v), old, strict=True)]
    if found_inf is not None:
        new = [torch.where(found_inf > 0, before, x) for x, before in zip(new, old, strict=True)]
    return new[0], new[1], new[2]


@torch.no_grad()
def _fused(leaves: Leaves, rates: Sequence[float], step: Tensor, hyper: Hyperparameters) -> None:
    """Update packed leaves in place by torch's fused AdamW, one call per device, dtype and weight decay.

    `torch.optim.adamw.adamw` makes the same call, but counts the updates of each leaf in a tensor of its own, which
    takes as long as the update of a small leaf.
    """
    kinds: dict[Any, list[int]] = {}
    for number, (p, rate) in enumerate(zip(leaves.params, rates, strict=True)):
        kinds.setdefault((p.device, p.dtype, rate), []).append(number)
    for (device, _, rate), chosen in kinds.items():
        # A rate on the CPU is passed on as a number.
        lr: Any = _to_device(hyper.lr, device) if isinstance(hyper.lr, Tensor) and not hyper.lr.is_cpu else hyper.lr
        values, grads, exp_avgs, exp_avg_sqs = ([column[number] for number in chosen] for column in leaves)
        torch._fused_adamw_(
            values,
            grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs=[],
            state_steps=[_to_device(step + 1, device)] * len(chosen),
            lr=lr,
            beta1=hyper.betas[0],
            beta2=hyper.betas[1],
            weight_decay=rate,
            eps=hyper.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=_to_device(hyper.grad_scale, device),
            found_inf=_to_device(hyper.found_inf, device),
        )


def _to_device(x: Any, device: torch.device) -> Any:
    return None if x is None else x.to(device, non_blocking=True)


@torch.no_grad()
def _update_in_place(leaves: Leaves, rates: Sequence[float], step: Tensor, hyper: Hyperparameters) -> None:
    """`_fused` of leaves of any layout."""
    own = Leaves(*([packed(x) for x in column] for column in leaves))
    if hyper.grad_scale is not None:  # torch divides the gradients in place
        own = own._replace(grads=unshared(own.grads))
    _fused(own, rates, step, hyper)
    for part in ("params", "exp_avg", "exp_avg_sq"):
        for target, source in zip(getattr(leaves, part), getattr(own, part), strict=True):
            if target is not source:
                target.copy_(source)


@torch.no_grad()
def _copied(leaves: Leaves, grads: bool) -> Leaves:
    """Return contiguous copies of weights and moments, and of gradients if `grads`."""
    shared = {} if grads else {"grads": [packed(g) for g in leaves.grads]}
    copies = {
        part: [x.clone(memory_format=torch.contiguous_format) for x in column]
        for part, column in leaves._asdict().items()
        if part not in shared
    }
    return Leaves(**copies, **shared)


def _packed_zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, memory_format=torch.contiguous_format)


def _is_differentiated(inputs: Sequence[Any], donate: bool) -> bool:
    """Return whether autograd or a transform tracks any input; donated inputs are not differentiated.

    Under `torch.compile` that is unknown, and the formula, unlike the fused operation, can be traced.
    """
    if torch.compiler.is_compiling() or in_forward_mode():
        return True
    recorded = torch.is_grad_enabled() and not donate
    if not (recorded or in_transform()):
        return False
    return any((recorded and x.requires_grad) or is_transformed(x) for x in inputs if isinstance(x, Tensor))


def _require_equal(leaves: Leaves, params: Any) -> None:
    """Refuse gradients and moments that differ from their weight in shape, dtype or device."""
    for number, (p, *rest) in enumerate(zip(*leaves, strict=True)):
        shape, dtype, device = p.shape, p.dtype, p.device
        for part, x in zip(Leaves._fields[1:], rest, strict=True):
            if x.shape != shape or x.dtype != dtype or x.device != device:
                require_shape(f"{part} of {_name(params, number)}", x, device, tuple(shape), dtype)


def _require_apart(leaves: Leaves, params: Any) -> None:
    """Refuse weights and moments that share memory with one another or with a gradient."""
    count = len(leaves.params)
    places = overlap([*leaves.params, *leaves.exp_avg, *leaves.exp_avg_sq], leaves.grads)
    if places is not None:
        parts = ("params", "exp_avg", "exp_avg_sq", "grads")
        one, other = (f"{parts[place // count]} of {_name(params, place % count)}" for place in places)
        raise ValueError(
            f"{one} and {other} share memory, and donate=True updates in place: clone one of them, or leave out donate"
        )


def _name(params: Any, number: int) -> str:
    return repr(list(named_leaves(params))[number])
