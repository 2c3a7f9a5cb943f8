"""Hyper-connections that leave a network what it is, and learn from the first step on."""

import dataclasses
import math
from typing import Any

from rlm_mhc.config import ModelConfig
from rlm_mhc.params import INIT_STD, WeightSpec, weight_table
from rlm_mhc.tree import named_leaves
from rlm_mhc.variants import PRESETS, PROJECTIONS

# By how much logits of the mappings vary between tokens: what it does to a model's logits is near fp32's rounding.
OPENING = 1e-6
# By what share of their mean the gates of different streams differ.
SPREAD = 0.25
# Its start is not the same read from the last stream to the first.
LOPSIDED = ("orthostochastic",)


def closed_specs(config: ModelConfig) -> dict[str, WeightSpec]:
    """mHC weights, by name, with which a model is the plain pre-norm transformer and yet all of them learn.

    With `alpha = 0` mappings are constants. Let `x[i]` be the streams, of mean `x̄`, and let

        post[i] = 1 + s · sin(2π (i + ½) / n),   pre[j] = (1 + s · cos(2π (j + ½) / n)) / n,   res doubly stochastic.

    The mean then goes on as the plain residual does, `x̄' = x̄ + y`: columns of `res` sum to 1, `post` is 1 on average.
    The streams' deviations from it start at zero and are fed by the sines, which change sign when streams are counted
    from the last to the first; `res` at its start is the same counted either way, so they stay odd in that sense, and
    the even cosines do not see them: a sub-layer reads `Σ_j pre[j] · x[j] = x̄`, whatever `s`.

    But streams differ by a share `s`, and since `pre` does too, so do their cotangents. The gradient of `res[i, j]` is
    the product of cotangent i and stream j; from equal ones it would vanish, since rows and columns sum to 1 whatever
    the logits. So all biases learn at once, but for the first `res`, which mixes equal streams, and the last one,
    whose streams are averaged. (Two streams have no even cosine: their `pre` is even. So is that of the projection
    `orthostochastic`, whose start is not symmetric.)

    The gradient of `phi` is proportional to `alpha`, that of `alpha` to `phi`: neither may be zero. `phi ~ N(0, 0.02²)`
    as in `fn.init`, and `alpha = 1e-6 / (0.02 · sqrt(n · c))`, with which logits of the mappings vary by 1e-6 between
    tokens, in a model of any width. The model's logits change by about as much, and Adam, whose updates do not depend
    on the size of a gradient, makes `alpha` larger than this in its first steps.

    >>> import torch
    >>> specs = closed_specs(ModelConfig.preset("tiny"))
    >>> 2 * torch.sigmoid(torch.tensor(specs["layers.0.attn_mhc.bias"].mean[4:8]))
    tensor([1.1768, 1.1768, 0.8232, 0.8232])
    """
    if not config.mhc_enabled:
        return {}
    preset, n = PRESETS[config.mhc_preset], config.mhc_flows
    alpha = OPENING / (INIT_STD * math.sqrt(n * config.hidden_dim))
    bias = _spread_gates(config) + PROJECTIONS[config.projection].near_identity(n)
    means: dict[str, Any] = {"phi": 0.0, "alpha": alpha, "bias": bias}
    head = means | {"bias": (_logit(1 / n - preset.eps),) * n}
    return {
        name: dataclasses.replace(spec, mean=(head if name.startswith("head_mhc") else means)[name.rsplit(".", 1)[1]])
        for name, spec in named_leaves(weight_table(config)).items()
        if "mhc" in name
    }


def _spread_gates(config: ModelConfig) -> tuple[float, ...]:
    preset, n = PRESETS[config.mhc_preset], config.mhc_flows
    angles = [2 * math.pi * (stream + 0.5) / n for stream in range(n)]
    spread = 0.0 if config.projection in LOPSIDED else SPREAD
    pre = [(1 + spread * math.cos(angle)) / n for angle in angles]
    post = [1 + SPREAD * math.sin(angle) for angle in angles]
    if preset.gates == "tanh":
        return (*pre, *post)
    return (*(_logit(x - preset.eps) for x in pre), *(_logit(x / 2) for x in post))


def _logit(x: float) -> float:
    return math.log(x / (1 - x))
