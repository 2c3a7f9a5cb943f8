"""The reference mathematics: pure, shape-typed functions of explicit parameter trees.

Differentiate, batch and compile them as you like: `torch.func.grad_and_value(fn.loss)(params, batch, config)`.
"""

from rlm_mhc.fn.attention import Attended, attend, causal_attention, masked_attention, self_attention
from rlm_mhc.fn.block import BlockOutput, HyperOutput, block, hyper_connection
from rlm_mhc.fn.cache import Cache, init_cache
from rlm_mhc.fn.clip import clip_by_global_norm, global_norm
from rlm_mhc.fn.context import Context, positions
from rlm_mhc.fn.decode import decode_step, extend, prefill
from rlm_mhc.fn.gain import composite_gain, cumulative_gain, stochasticity_error, stream_dominance
from rlm_mhc.fn.generate import Decoder, Drawn, Generated, generate, generate_steps
from rlm_mhc.fn.kernels import REFERENCE, Kernels
from rlm_mhc.fn.linear import embedding, linear
from rlm_mhc.fn.lm import Backbone, backbone, collapse, embed, expand, forward, head
from rlm_mhc.fn.lora import Adapter, LoraParams, lora_init, lora_merge
from rlm_mhc.fn.loss import Batch, count_targets, loss, token_loss_sum
from rlm_mhc.fn.mhc import (
    Hidden,
    MHCMappings,
    collapse_learned,
    collapse_streams,
    expand_streams,
    mhc_aggregate,
    mhc_combine,
    mhc_mappings,
)
from rlm_mhc.fn.mlp import swiglu
from rlm_mhc.fn.norm import norm, rms_norm, widen
from rlm_mhc.fn.optim import AdamWState, adamw, adamw_init
from rlm_mhc.fn.projections import project
from rlm_mhc.fn.rope import rotary_embedding, rotary_table
from rlm_mhc.fn.sample import Sampling, filter_logits, sample_token
from rlm_mhc.fn.schedule import cosine_schedule
from rlm_mhc.fn.sinkhorn import sinkhorn_implicit, sinkhorn_knopp
from rlm_mhc.params import LMParams, MHCHead, MHCParams, cast, count, decay_mask, init, names

__all__ = [
    "REFERENCE",
    "AdamWState",
    "Adapter",
    "Attended",
    "Backbone",
    "Batch",
    "BlockOutput",
    "Cache",
    "Context",
    "Decoder",
    "Drawn",
    "Generated",
    "Hidden",
    "HyperOutput",
    "Kernels",
    "LMParams",
    "LoraParams",
    "MHCHead",
    "MHCMappings",
    "MHCParams",
    "Sampling",
    "adamw",
    "adamw_init",
    "attend",
    "backbone",
    "block",
    "cast",
    "causal_attention",
    "clip_by_global_norm",
    "collapse",
    "collapse_learned",
    "collapse_streams",
    "composite_gain",
    "cosine_schedule",
    "count",
    "count_targets",
    "cumulative_gain",
    "decay_mask",
    "decode_step",
    "embed",
    "embedding",
    "expand",
    "expand_streams",
    "extend",
    "filter_logits",
    "forward",
    "generate",
    "generate_steps",
    "global_norm",
    "head",
    "hyper_connection",
    "init",
    "init_cache",
    "linear",
    "lora_init",
    "lora_merge",
    "loss",
    "masked_attention",
    "mhc_aggregate",
    "mhc_combine",
    "mhc_mappings",
    "names",
    "norm",
    "positions",
    "prefill",
    "project",
    "rms_norm",
    "rotary_embedding",
    "rotary_table",
    "sample_token",
    "self_attention",
    "sinkhorn_implicit",
    "sinkhorn_knopp",
    "stochasticity_error",
    "stream_dominance",
    "swiglu",
    "token_loss_sum",
    "widen",
]
