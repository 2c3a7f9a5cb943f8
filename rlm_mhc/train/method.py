"""What a run trains of its model, and how the model comes from that."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rlm_mhc.fn import LMParams
from rlm_mhc.tree import tree_map


class Method(NamedTuple):
    """`model_of(trained)`: the model's tree, to run and to save; `read(folder, params)`: what is trained, from a
    checkpoint with the model `params`; `write(folder, trained)`: what a checkpoint holds of it beside the model;
    `facts`: what a run that goes on must have in common with the checkpoint's, as JSON values."""

    model_of: Callable[[Any], LMParams]
    read: Callable[[Path, LMParams], Any]
    write: Callable[[Path, Any], object]
    facts: dict[str, Any]


def _masters(folder: Path, params: LMParams) -> LMParams:
    return tree_map(lambda leaf: leaf.float(), params)


# All weights, in fp32.
FULL = Method(lambda trained: trained, _masters, lambda folder, trained: None, {})
