"""AdamW and gradient clipping as functions of trees."""

from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from rlm_mhc.tree import tree_leaves, tree_map
from rlm_mhc.types import Scalar

Tree = TypeVar("Tree")


class AdamWState(NamedTuple):
    """First and second moments in the structure of the parameters, and the number of updates, a 0-d fp32 tensor."""

    exp_avg: Any
    exp_avg_sq: Any
    step: Tensor


def adamw_init(params: Any) -> AdamWState:
    """Zero moments for a tree of parameters.

    >>> adamw_init((torch.ones(2),)).exp_avg
    (tensor([0., 0.]),)
    """
    device = tree_leaves(params)[0].device
    return AdamWState(
        tree_map(torch.zeros_like, params),
        tree_map(torch.zeros_like, params),
        torch.zeros((), dtype=torch.float32, device=device),
    )


@torch.no_grad()
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
    """One update: `p ← p - lr · (m̂ / (sqrt(v̂) + eps) + weight_decay · p)`, by torch's own functional AdamW.

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
        donate: update in place; the arguments, gradients included, must not be used again.

    Source: Loshchilov & Hutter, arXiv 1711.05101; `torch.optim.adamw.adamw`.

    >>> params, state = adamw((torch.ones(1),), (torch.ones(1),), adamw_init((torch.ones(1),)), (False,), lr=0.1)
    >>> params
    (tensor([0.9000]),)
    """
    if not donate:
        params, state = tree_map(torch.clone, params), tree_map(torch.clone, state)
        if grad_scale is not None:  # torch divides in place
            grads = tree_map(torch.clone, grads)
    columns = map(tree_leaves, (params, grads, state.exp_avg, state.exp_avg_sq, decay))
    rows = list(zip(*columns, strict=True))
    for decayed, rate in ((True, weight_decay), (False, 0.0)):
        chosen = [row[:4] for row in rows if bool(row[4]) == decayed]
        if not chosen:
            continue
        values, gradients, exp_avgs, exp_avg_sqs = map(list, zip(*chosen, strict=True))
        torch_adamw(
            values,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs=[],
            # torch counts updates once per leaf, in place: each gets its own counter.
            state_steps=[state.step.clone() for _ in values],
            fused=True,
            grad_scale=grad_scale,
            found_inf=found_inf,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=rate,
            eps=eps,
            maximize=False,
        )
    done = 1 if found_inf is None else 1 - found_inf
    return params, AdamWState(state.exp_avg, state.exp_avg_sq, state.step + done)


def leaf_norms(tree: Any) -> Float[Tensor, "leaves"]:
    """`sqrt(Σ x²)` of each leaf, in tree order.

    >>> leaf_norms((torch.tensor([3.0, 4.0]), torch.tensor([2.0])))
    tensor([5., 2.])
    """
    leaves = tree_leaves(tree)
    if {(leaf.device.type, leaf.dtype) for leaf in leaves} == {("cpu", torch.float32)}:
        # On the CPU torch's norm of a list runs on one thread; a dot product runs on all.
        return torch.stack([torch.dot(leaf.reshape(-1), leaf.reshape(-1)) for leaf in leaves]).sqrt()
    return torch.stack(torch._foreach_norm(leaves))


def global_norm(tree: Any) -> Scalar:
    """`sqrt(Σ x²)` over all leaves.

    >>> global_norm((torch.tensor([3.0]), torch.tensor([4.0])))
    tensor(5.)
    """
    return torch.linalg.vector_norm(leaf_norms(tree))


def clip_by_global_norm(grads: Tree, max_norm: float) -> tuple[Tree, Scalar]:
    """Scale all gradients by `min(1, max_norm / norm)`; also returns the norm before clipping.

    Raises:
        ValueError: unless `max_norm > 0`.

    >>> clip_by_global_norm((torch.tensor([3.0, 4.0]),), 1.0)
    ((tensor([0.6000, 0.8000]),), tensor(5.))
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm}: expected a number above 0")
    norm = global_norm(grads)
    scale = max_norm / norm.clamp(min=max_norm)
    return tree_map(lambda g: g * scale.to(g.dtype), grads), norm
