"""What a stage of a whole block is built of, and what it keeps of each sub-layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.mhc import MHCMappings
from rlm_mhc.params import MHCParams
from rlm_mhc.stage.core import Stage


class Site(NamedTuple):
    """A sub-layer: its mHC's name, the name of the norm before it, and the rest of it as a stage."""

    name: str
    norm: str
    branch: Stage

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of phi, alpha, bias and the norm's weight."""
        return (*(f"{self.name}.{field}" for field in MHCParams._fields), self.norm)


class HyperKept(NamedTuple):
    """Of one sub-layer: its mappings, its output, and what mappings and sub-layer keep for themselves."""

    mappings: MHCMappings
    output: Tensor
    of_mappings: Any
    of_branch: Any


class BlockBuilder(NamedTuple):
    """What a kernel for whole blocks brings.

    - `build(first, second, config, keep_streams)`: the stage `hidden -> hidden` of two sites, whose branches take a
      normed input. It keeps `(streams between them, or (), (HyperKept, HyperKept))`.
    - `scratch(config, state)`: the most bytes that its backward works with beside tensors of one stream; all streams
      take `state`.
    """

    build: Callable[[Site, Site, ModelConfig, bool], Stage]
    scratch: Callable[[ModelConfig, int], int]
