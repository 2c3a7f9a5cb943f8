"""Weights that are functions of what is trained: one layer of them exists at a time, and one layer of gradients."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from rlm_mhc.config import LoraConfig
from rlm_mhc.fn.lora import LoraParams, lora_decay_mask, lora_merge_layer, lora_pull_layer, lora_reads
from rlm_mhc.fn.transforms import is_transformed
from rlm_mhc.params import Layer, LMParams
from rlm_mhc.tree import tree_map


class WeightSource(NamedTuple):
    """How a model's weights come from what is trained, a tree with the fields `layers` and `head_mhc`, and how
    gradients go back.

    `top(trained)`: the weights beside the layers', of which at most `head_mhc` is trained; `layer(trained, index)`:
    those of a layer; `pull(trained, index, gradients)`: from the gradients of the layer's weights that `reads` names
    to those of what is trained of it; `decay`: a tree of booleans, where weight decay applies.
    """

    top: Callable[[Any], LMParams]
    layer: Callable[[Any, int], Layer]
    pull: Callable[[Any, int, Mapping[str, Tensor]], Any]
    reads: tuple[str, ...]
    decay: Any


def lora_source(base: LMParams, example: LoraParams, lora: LoraConfig) -> WeightSource:
    """Adapters like `example` to weights that stay as they are, in the dtypes that the model is run with."""
    base, scale = tree_map(constant, base), lora.scale
    return WeightSource(
        top=lambda trained: base._replace(layers=(), head_mhc=trained.head_mhc or base.head_mhc),
        layer=lambda trained, index: lora_merge_layer(base.layers[index], trained.layers[index], scale),
        pull=lambda trained, index, grads: lora_pull_layer(trained.layers[index], grads, scale),
        reads=lora_reads(base.layers[0], example.layers[0]),
        decay=lora_decay_mask(example),
    )


def constant(x: Tensor) -> Tensor:
    """`x` as a program takes weights, whose gradients it computes itself: without a graph of autograd's.

    Raises:
        ValueError: under a transform of `torch.func`, which would find nothing to differentiate.
    """
    if is_transformed(x):
        raise ValueError("a train step cannot be transformed by torch.func: differentiate fn.loss and fn.adamw")
    return x.detach() if x.requires_grad else x
