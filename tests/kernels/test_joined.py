"""Derivatives that the fused kernels do not have are errors, never zeros."""

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from rlm_mhc.kernels.mix_pre import Settings
from rlm_mhc.kernels.selftest import ARGUMENTS, draw_inputs, fused
from rlm_mhc.kernels.sinkhorn import sinkhorn_knopp

MISSING = {
    "jvp": lambda f: lambda x: jvp(f, (x,), (x,))[1],
    "jvp of jvp": lambda f: lambda x: jvp(lambda x: jvp(f, (x,), (x,))[1], (x,), (x,))[1],
    "jvp of grad": lambda f: lambda x: jvp(grad(f), (x,), (x,))[1],
    "grad of jvp": lambda f: grad(lambda x: jvp(f, (x,), (x,))[1]),
    "grad of grad": lambda f: grad(lambda x: grad(f)(x).square().sum()),
    "vmap of grad of grad": lambda f: vmap(grad(lambda x: grad(f)(x).square().sum())),
    "grad of vmap of grad": lambda f: grad(lambda x: vmap(grad(f))(x).square().sum()),
    "jacrev of jacrev": lambda f: jacrev(jacrev(f)),
    "jacfwd of jacrev": lambda f: jacfwd(jacrev(f)),
}
COMPILED = ("jvp", "jvp of grad", "grad of jvp", "grad of grad", "vmap of grad of grad")


def losses(device):
    """Each fused function as a loss of its first argument, `[2, *b]`."""

    def loss(name):
        x, *rest = draw_inputs(name, 2, 16, 2, torch.float32, device).values()
        run = fused(name, Settings(2, 1e-6, 0.0))
        # Under vmap `x` has no axis of tokens.
        per_token = [key not in ("phi", "alpha", "bias", "weight") for key in ARGUMENTS[name][1:]]

        def of(x):
            alone = x.dim() == 2
            others = [y[:1] if alone and own else y for y, own in zip(rest, per_token, strict=True)]
            return sum(y.float().square().sum() for y in run(x[None] if alone else x, *others))

        return of, x

    return {name: loss(name) for name in ARGUMENTS} | {
        "sinkhorn_knopp": (lambda x: sinkhorn_knopp(x, num_iters=2).square().sum(), torch.randn(2, 3, 3, device=device))
    }


@pytest.mark.parametrize("transform", MISSING)
@pytest.mark.parametrize("name", [*ARGUMENTS, "sinkhorn_knopp"])
def test_second_derivatives_and_forward_mode_are_errors(name, transform, device):
    loss, x = losses(device)[name]
    assert grad(loss)(x).abs().max() > 0
    with pytest.raises((RuntimeError, NotImplementedError), match=r"second derivatives|jvp"):
        MISSING[transform](loss)(x)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("transform", COMPILED)
@pytest.mark.parametrize("name", ["mix_post", "sinkhorn_knopp"])
def test_compiled_too(name, transform, device):
    loss, x = losses(device)[name]
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.compile(MISSING[transform](loss), backend="eager", fullgraph=True)(x)
