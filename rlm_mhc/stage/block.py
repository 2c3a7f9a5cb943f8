"""The stage of a block: two sub-layers, and the residuals of both by name."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.mhc import Hidden, MHCMappings
from rlm_mhc.params import MHCParams
from rlm_mhc.stage.core import Grads, Stage, Weights


class Site(NamedTuple):
    """A sub-layer: its mHC's name, the name of the norm before it, and the rest of it as a stage."""

    name: str
    norm: str
    branch: Stage

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of phi, alpha, bias and the norm's weight."""
        return (*(f"{self.name}.{field}" for field in MHCParams._fields), self.norm)


class HyperResiduals(NamedTuple):
    """Residuals of one sub-layer: its mappings, its output, and those of its mappings and its branch."""

    mappings: MHCMappings
    output: Tensor
    of_mappings: Any
    of_branch: Any


class BlockResiduals(NamedTuple):
    """Residuals of a block: those of its sub-layers, and the state `between` them, or `()` where that is replayed."""

    attention: Any
    mlp: Any
    between: Any


class BlockBuilder(NamedTuple):
    """What a kernel for whole blocks brings.

    - `build(first, second, config, keep_streams)`: the stage `hidden -> hidden` of two sites, whose branches take a
      normed input; its residuals are `BlockResiduals` of `HyperResiduals`.
    - `scratch(config, state)`: the most bytes that its backward works with beside tensors of one stream; all streams
      take `state`.
    """

    build: Callable[[Site, Site, ModelConfig, bool], Stage]
    scratch: Callable[[ModelConfig, int], int]


def block_of(attention: Stage, mlp: Stage, keep_between: bool) -> Stage:
    """The stage of two sub-layers; its residuals are `BlockResiduals`. With `keep_between=False` both must replay."""

    def forward(weights: Weights, hidden: Hidden) -> tuple[Hidden, BlockResiduals]:
        between, first = attention.forward(weights, hidden)
        after, second = mlp.forward(weights, between)
        return after, BlockResiduals(first, second, between if keep_between else ())

    def backward(
        weights: Weights, hidden: Hidden, residuals: BlockResiduals, cotangent: Hidden
    ) -> tuple[Grads, Hidden]:
        between = residuals.between if keep_between else _replay(attention, hidden, residuals.attention)
        of_mlp, cotangent = mlp.backward(weights, between, residuals.mlp, cotangent)
        of_attention, cotangent = attention.backward(weights, hidden, residuals.attention, cotangent)
        return of_attention | of_mlp, cotangent

    def replay(hidden: Hidden, residuals: BlockResiduals) -> Hidden:
        return _replay(mlp, _replay(attention, hidden, residuals.attention), residuals.mlp)

    return Stage(forward, backward, replay)


def _replay(s: Stage, x: Any, residuals: Any) -> Any:
    assert s.replay is not None, "a block that does not keep the state between its sub-layers replays it"
    return s.replay(x, residuals)
