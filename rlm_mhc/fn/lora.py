"""LoRA as a change of variables: a weight is `W + alpha / r · B · A`, and its gradient is pulled back to A and B.

Source: Hu et al., arXiv 2106.09685; initial values and names as in the library peft.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rlm_mhc.config import LoraConfig
from rlm_mhc.fn.norm import widen
from rlm_mhc.fn.product import add_product, product
from rlm_mhc.params import MLP, Layer, LMParams, MHCHead, MHCParams, SelfAttention
from rlm_mhc.tree import from_named, named_leaves


class Adapter(NamedTuple):
    """`lora_A: [r, in]` and `lora_B: [out, r]` of one weight `[out, in]`."""

    lora_A: Tensor
    lora_B: Tensor


class LoraParams(NamedTuple):
    """What is trained: of each layer by dotted name an `Adapter`, or the mHC weights themselves; and those of the head
    where they are trained and there are some."""

    layers: tuple[dict[str, Adapter | MHCParams], ...]
    head_mhc: MHCHead | tuple[()] = ()


def lora_init(base: LMParams, lora: LoraConfig, *, seed: int = 0) -> LoraParams:
    """Adapters that change nothing yet: A uniform in ±1/sqrt(in), B zero, both in fp32; mHC weights as in `base`.

    Values depend on `seed` and each adapter's name alone.

    >>> from rlm_mhc import ModelConfig, fn
    >>> trained = lora_init(fn.init(ModelConfig.preset("tiny")), LoraConfig(rank=4, targets=["v_proj"]))
    >>> list(trained.layers[0]), trained.layers[0]["self_attn.v_proj"].lora_A.shape
    (['attn_mhc', 'self_attn.v_proj', 'mlp_mhc'], torch.Size([4, 128]))
    """
    layers = tuple(_init_layer(layer, f"layers.{i}", lora, seed) for i, layer in enumerate(base.layers))
    head = base.head_mhc if lora.train_mhc else ()
    return LoraParams(layers, MHCHead(*(w.to(torch.float32, copy=True) for w in head)) if head else ())


def _init_layer(layer: Layer, name: str, lora: LoraConfig, seed: int) -> dict[str, Adapter | MHCParams]:
    trained: dict[str, Adapter | MHCParams] = {}
    for field, part in layer._asdict().items():
        if isinstance(part, MHCParams) and lora.train_mhc:
            trained[field] = MHCParams(*(w.to(torch.float32, copy=True) for w in part))
        if isinstance(part, (SelfAttention, MLP)):
            for target in (target for target in lora.targets if target in part._fields):
                key = f"{field}.{target}"
                trained[key] = _init_adapter(getattr(part, target).weight, lora.rank, f"{seed}:{name}.{key}")
    return trained


def _init_adapter(weight: Tensor, rank: int, name: str) -> Adapter:
    out, into = weight.shape
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    uniform = torch.rand(rank, into, generator=generator, dtype=torch.float32, device="cpu")
    zeros = torch.zeros(out, rank, dtype=torch.float32, device=weight.device)
    return Adapter(((2 * uniform - 1) / math.sqrt(into)).to(weight.device), zeros)


def lora_merge(base: LMParams, trained: LoraParams, scale: float) -> LMParams:
    """The model with adapters merged into its weights, in the dtypes of `base`; `scale` is `alpha / r`.

    >>> from rlm_mhc import ModelConfig, fn
    >>> base = fn.init(ModelConfig.preset("tiny"))
    >>> merged = lora_merge(base, lora_init(base, LoraConfig(rank=4)), 4.0)
    >>> torch.equal(merged.layers[0].mlp.up_proj.weight, base.layers[0].mlp.up_proj.weight)
    True
    """
    pairs = zip(base.layers, trained.layers, strict=True)
    layers = tuple(lora_merge_layer(layer, own, scale) for layer, own in pairs)
    return base._replace(layers=layers, head_mhc=trained.head_mhc or base.head_mhc)


def lora_merge_layer(base: Layer, trained: Mapping[str, Adapter | MHCParams], scale: float) -> Layer:
    """`lora_merge` of one layer."""
    named = named_leaves(base)
    for name, own in trained.items():
        if isinstance(own, Adapter):
            named[f"{name}.weight"] = merge_weight(named[f"{name}.weight"], own.lora_A, own.lora_B, scale)
        else:
            named |= {f"{name}.{field}": leaf for field, leaf in own._asdict().items()}
    return from_named(base, named)


def merge_weight(
    weight: Float[Tensor, "out in"], a: Float[Tensor, "r in"], b: Float[Tensor, "out r"], scale: float
) -> Float[Tensor, "out in"]:
    """`weight + scale · b · a`, computed in fp32 or wider, in the dtype of `weight`."""
    return add_product(widen(weight), b, a, scale).to(weight.dtype)


def lora_pull_layer(
    trained: Mapping[str, Adapter | MHCParams], grads: Mapping[str, Tensor], scale: float
) -> dict[str, Adapter | MHCParams]:
    """From the gradient of a merged layer's weights by name, those that `lora_reads` names, to that of what is trained
    of it."""

    def pull(name: str, own: Any) -> Any:
        if isinstance(own, Adapter):
            return Adapter(*pull_weight(grads[f"{name}.weight"], own.lora_A, own.lora_B, scale))
        return type(own)(*(grads[f"{name}.{field}"] for field in own._fields))

    return {name: pull(name, own) for name, own in trained.items()}


def pull_weight(
    grad: Float[Tensor, "out in"], a: Float[Tensor, "r in"], b: Float[Tensor, "out r"], scale: float
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """The gradients of A and B, `scale · bᵀ · grad` and `scale · grad · aᵀ`."""
    return scale * product(b.mT, grad), scale * product(grad, a.mT)


def lora_reads(base: Layer, trained: Mapping[str, Adapter | MHCParams]) -> tuple[str, ...]:
    """The names of a layer's weights whose gradients `lora_pull_layer` reads, in the order of the layer."""
    read = {
        f"{name}.{field}"
        for name, own in trained.items()
        for field in (("weight",) if isinstance(own, Adapter) else own._fields)
    }
    return tuple(name for name in named_leaves(base) if name in read)


def lora_decay_mask(trained: LoraParams) -> LoraParams:
    """True at what weight decay applies to: A, B and phi."""

    def decayed(own: Any) -> Any:
        return type(own)(*(field in ("lora_A", "lora_B", "phi") for field in own._fields))

    layers = tuple({name: decayed(own) for name, own in layer.items()} for layer in trained.layers)
    return LoraParams(layers, decayed(trained.head_mhc) if trained.head_mhc else ())
