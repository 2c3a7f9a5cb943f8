"""Whether a transform of `torch.func` is under way. PyTorch has no public API for it."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def in_forward_mode() -> bool:
    """Return whether `torch.func.jvp`, or autograd's forward mode, is under way.

    >>> in_forward_mode(), torch.func.jvp(lambda x: x * in_forward_mode(), (torch.ones(()),), (torch.ones(()),))[0]
    (False, tensor(1.))
    """
    return forward_ad._current_level >= 0


def in_transform() -> bool:
    """Return whether any transform of `torch.func` is under way.

    >>> in_transform(), torch.func.grad(lambda x: x * in_transform())(torch.ones(()))
    (False, tensor(1.))
    """
    return torch._C._functorch.maybe_current_level() is not None


def is_transformed(x: Tensor) -> bool:
    """Return whether a transform of `torch.func` tracks a tensor.

    >>> is_transformed(torch.ones(())), torch.func.grad(lambda x: x * is_transformed(x))(torch.ones(()))
    (False, tensor(1.))
    """
    return torch._C._functorch.is_functorch_wrapped_tensor(x)
