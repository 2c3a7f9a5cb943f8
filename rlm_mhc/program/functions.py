"""The few functions that a step consists of, each compiled once and shared by all layers."""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlm_mhc.config import ModelConfig
from rlm_mhc.fn.kernels import Kernels
from rlm_mhc.fn.lm import expand, head
from rlm_mhc.fn.loss import token_loss_sum
from rlm_mhc.fn.mhc import Hidden
from rlm_mhc.fn.norm import widen
from rlm_mhc.params import Embedding, Linear, LMParams, MHCHead, RMSNorm
from rlm_mhc.program.block import block_stage, residual_mappings
from rlm_mhc.program.compile import compile_whole
from rlm_mhc.program.monitors import Sampled, sample
from rlm_mhc.stage import Weights, recompute
from rlm_mhc.tree import tree_map

OnCompile = Callable[[int, int, str], object]


class Functions(NamedTuple):
    """`embed(matrix, tokens) -> hidden`;
    `forward(weights, hidden) -> (hidden, kept, sampled)`, `sampled` being what is monitored;
    `head(top, hidden, targets, scale) -> (loss, gradients of top, cotangent)`, of one chunk, `top` being the weights
    `(norm, matrix, *head_mhc)`;
    `loss(top, hidden, targets) -> loss`, of one chunk, unscaled and without gradients;
    `backward(weights, hidden, kept, cotangent) -> (gradients, cotangent)`;
    `replay(hidden, kept) -> hidden`, the streams after a block again."""

    embed: Callable[..., Any]
    forward: Callable[..., Any]
    head: Callable[..., Any]
    loss: Callable[..., Any]
    backward: Callable[..., Any]
    replay: Callable[..., Any]


NAMES = {
    "embed": "embedding",
    "forward": "block, forward",
    "head": "head and loss",
    "loss": "held-out loss",
    "replay": "streams",
    "backward": "block, backward",
}


def make_functions(
    config: ModelConfig,
    kernels: Kernels,
    remat: str,
    *,
    flat: bool = True,
    compiled: bool = False,
    on_compile: OnCompile | None = None,
    reads: tuple[str, ...] | None = None,
    evaluates: bool = False,
) -> Functions:
    """The functions of a model, compiled where asked for.

    With `flat` the gradient of a block is one vector, in the order of its weights; without, a tuple of them. Where
    `reads` is given, a block's gradients are those of these weights alone, and the head's those of `head_mhc` alone.
    `on_compile(number, of, name)` is called before each is compiled, which happens at its first call; `of` counts
    `loss` where `evaluates` is set. What is compiled serves one shape: make new functions for another.
    """
    keeping = block_stage(config, kernels, keep_streams=remat != "mhc")
    block = recompute(keeping) if remat == "full" else keeping

    def embed(matrix: Tensor, tokens: Tensor) -> Hidden:
        return expand(torch.nn.functional.embedding(tokens, matrix), config)

    def forward(weights: Weights, hidden: Hidden) -> tuple[Hidden, Any, Sampled]:
        hidden, kept = keeping.forward(weights, hidden)
        sampled = sample(residual_mappings(kept, config), hidden.x)
        return _contiguous(hidden), () if remat == "full" else kept, sampled

    def backward(weights: Weights, hidden: Hidden, kept: Any, cotangent: Hidden) -> tuple[Any, Hidden]:
        grads, cotangent = block.backward(weights, hidden, kept, cotangent)
        parts = tuple(widen(grads[name]) for name in weights if name in (grads if reads is None else reads))
        if flat:
            parts = (torch.cat([part.reshape(-1) for part in parts]),)
        return parts, _contiguous(cotangent)

    def head_chunk(
        top: tuple[Tensor, ...], hidden: Hidden, targets: Tensor, scale: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], Hidden]:
        fixed = top[: 0 if reads is None else 2]

        def loss(trained: tuple[Tensor, ...], hidden: Hidden) -> Tensor:
            return scale * loss_chunk(fixed + trained, hidden, targets)

        (g_top, g_hidden), value = torch.func.grad_and_value(loss, argnums=(0, 1))(top[len(fixed) :], hidden)
        return value, g_top, _contiguous(g_hidden)

    def loss_chunk(top: tuple[Tensor, ...], hidden: Hidden, targets: Tensor) -> Tensor:
        norm, matrix, *of_head = top
        head_mhc = MHCHead(*of_head) if of_head else ()
        params = LMParams(Embedding(matrix), (), RMSNorm(norm), Linear(matrix), head_mhc)
        return token_loss_sum(head(params, hidden, config, kernels), targets)

    def replay(hidden: Hidden, kept: Any) -> Hidden:
        assert keeping.replay is not None
        return _contiguous(keeping.replay(hidden, kept))

    functions = Functions(embed, forward, head_chunk, loss_chunk, backward, replay)
    if not compiled:
        return functions
    replays = remat == "mhc" and checkpoint_interval(config, remat) > 1
    used = [field for field in NAMES if field != "replay" or replays]
    of = len(used) - (not evaluates)
    numbers = itertools.count(1)

    def say(name: str) -> None:
        if on_compile is not None:
            on_compile(next(numbers), of, name)

    return functions._replace(**{field: _compile(getattr(functions, field), NAMES[field], say) for field in used})


def checkpoint_interval(config: ModelConfig, remat: str) -> int:
    """The streams are stored before every so many layers: `sqrt(n · layers / (n + 2))` with `remat="mhc"`, else 1.

    Source: arXiv 2512.24880, section 4.3.2.
    """
    n = config.mhc_flows
    return max(1, round(math.sqrt(n * config.num_layers / (n + 2)))) if remat == "mhc" else 1


def _contiguous(hidden: Hidden) -> Hidden:
    return tree_map(lambda x: x.contiguous(), hidden)


def _compile(f: Any, name: str, say: Callable[[str], None]) -> Any:
    run = compile_whole(f)
    unsaid = [name]

    def first_announced(*arguments: Any) -> Any:
        if unsaid:
            say(unsaid.pop())
        return run(*arguments)

    return first_announced
