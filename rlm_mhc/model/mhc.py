"""A hyper-connection as a module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlm_mhc import fn
from rlm_mhc.config import ModelConfig
from rlm_mhc.params import MHCParams, weight_table

# The compiler of PyTorch 2.11 does not find an attribute whose name is an `Undecayed`.
FINDS_UNDECAYED = torch.__version__ >= "2.13"


class Undecayed(str):
    """The name of a weight without weight decay.

    transformers' Trainer decides by names alone: it excludes those that contain `bias` or `_norm` in lower case.
    """

    def lower(self) -> str:
        """Return the name by which Trainer decides."""
        return f"{super().lower()}_norm"


def add_weights(module: nn.Module, specs: Any) -> None:
    """Register an uninitialised parameter for each `WeightSpec` of a named tuple."""
    for name, spec in specs._asdict().items():
        weight = nn.Parameter(torch.empty(spec.shape, dtype=spec.dtype(torch.get_default_dtype())))
        module.register_parameter(name if spec.decay else Undecayed(name), weight)


def weights_of(module: nn.Module, kind: Any) -> Any:
    """Return what `add_weights` registered, as a named tuple of a kind."""
    if not FINDS_UNDECAYED and torch.compiler.is_compiling():
        return kind(*module._parameters.values())
    return kind(*(getattr(module, name) for name in kind._fields))


class mHCLayer(nn.Module):
    """`fn.hyper_connection` around any branch, owning its weights: `phi`, `alpha`, `bias`.

    Args:
        hidden_dim: width c of a stream.
        num_flows: streams n.
        num_iters: Sinkhorn iterations.
        preset: a row of `rlm_mhc.variants.PRESETS`.
        projection: see `fn.project`; None: that of the preset.
        norm_eps: added to the mean square of the streams.

    Raises:
        ValueError: naming the argument, as a field of `ModelConfig`.

    >>> layer = mHCLayer(hidden_dim=8, num_flows=4)
    >>> layer(torch.ones(2, 5, 4, 8), lambda x: 0 * x).shape
    torch.Size([2, 5, 4, 8])
    """

    phi: Tensor
    alpha: Tensor
    bias: Tensor

    def __init__(
        self,
        hidden_dim: int = 2048,
        num_flows: int = 4,
        *,
        num_iters: int = 20,
        preset: str = "paper",
        projection: str | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.config = ModelConfig(
            hidden_dim=hidden_dim,
            num_layers=1,
            num_heads=1,
            head_dim=2,
            mhc_flows=num_flows,
            mhc_sinkhorn_iters=num_iters,
            mhc_preset=preset,
            mhc_projection=projection,
            norm_eps=norm_eps,
        )
        add_weights(self, self._specs())
        self.reset_parameters()

    def _specs(self) -> Any:
        return weight_table(self.config).layers[0].attn_mhc

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initial values of `fn.init`, the noise in `phi` from torch's generator."""
        if self.phi.is_meta:
            return
        seed = int(torch.randint(1 << 62, (), dtype=torch.int64, device="cpu"))
        for name, spec in self._specs()._asdict().items():
            own = getattr(self, name)
            own.copy_(spec.init(name, seed, own.device, own.dtype))

    def tree(self) -> MHCParams:
        """The weights as `fn` takes them."""
        return weights_of(self, MHCParams)

    def forward(self, streams: Any, branch: Callable[[Tensor], Any], has_aux: bool = False) -> Any:
        """`streams [*b, n, c]` after the sub-layer `branch: [*b, c] -> [*b, c]`; of the preset `single_pass` both are
        an `fn.Hidden`. With `has_aux` the branch returns `(output, aux)`, and this `(streams, aux)`."""
        hidden = fn.Hidden(streams) if isinstance(streams, Tensor) else streams
        after, _, aux = fn.hyper_connection(self.tree(), hidden, branch, self.config, has_aux=has_aux)
        out = after.x if isinstance(streams, Tensor) else after
        return (out, aux) if has_aux else out

    def get_connection_matrix(self) -> Tensor:
        """The part of `res` that does not depend on the input, that of zero streams: `[n, n]`, doubly stochastic."""
        zeros = self.phi.new_zeros(self.config.mhc_flows, self.config.hidden_dim)
        return fn.mhc_mappings(self.tree(), zeros, **self.config.mhc_options).res

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"hidden_dim={self.config.hidden_dim}, num_flows={self.config.mhc_flows}"
