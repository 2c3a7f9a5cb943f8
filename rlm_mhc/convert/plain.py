"""How far hyper-connections are from the plain residuals of a pre-norm transformer."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from rlm_mhc.checkpoint.shards import Read
from rlm_mhc.config import ModelConfig
from rlm_mhc.convert.gates import OPENING, closed_specs
from rlm_mhc.fn.block import hyper_connection
from rlm_mhc.fn.lm import collapse, expand
from rlm_mhc.params import Embedding, LMParams, MHCHead, MHCParams, RMSNorm
from rlm_mhc.variants import PRESETS

# Noise in phi makes an opening a little more or less than meant.
CLOSED = 2 * OPENING
# A weight that is off by so much changes logits by about as much.
READING = 5e-6


def require_plain(read: Read, config: ModelConfig) -> None:
    """Refuse hyper-connections that are not plain residuals.

    They are where both hold. Gates are closed: `|alpha| · rms(columns of phi)`, by which their logits vary between
    tokens, is at most 2e-6. And what each sub-layer reads is the plain sum of the embedding and all outputs before it,
    each with a weight of 1 ± 5e-6 (see `reading_errors`).

    Args:
        read: gives mHC weights by name; those of one sub-layer at a time.
        config: the model's shape.

    Raises:
        ValueError: naming the first weight that says otherwise, and by how much.

    >>> from rlm_mhc import fn; from rlm_mhc.tree import named_leaves
    >>> config = ModelConfig.preset("tiny")
    >>> weights = named_leaves(fn.init(config))
    >>> require_plain(lambda names: {name: weights[name] for name in names}, config)
    Traceback (most recent call last):
    ...
    ValueError: layers.0.attn_mhc.alpha: the gates are open, their logits vary by 4.5e-03 between tokens, not by at \
most 2e-06; only closed ones are plain residuals
    """
    sites = site_names(config)
    if not sites:
        return
    for site in sites:
        opening = _opening(read([f"{site}.{leaf}" for leaf in ("phi", "alpha")]), site, config)
        if not opening <= CLOSED:
            raise ValueError(
                f"{site}.alpha: the gates are open, their logits vary by {opening:.1e} between tokens, "
                f"not by at most {CLOSED:.0e}; only closed ones are plain residuals"
            )
    biases = {site: read([f"{site}.bias"])[f"{site}.bias"] for site in sites}
    for site, error in reading_errors(biases, config):
        if not error <= READING:
            raise ValueError(
                f"{site}.bias: no plain residual, an output is read with a weight off by {error:.1e}, "
                f"not by at most {READING:.0e}"
            )


def require_plain_start(config: ModelConfig) -> None:
    """Refuse configs of which no weights are plain residuals.

    Raises:
        ValueError: for one stream, or where a preset shrinks its streams too much for that many layers.
    """
    if not config.mhc_enabled:
        return
    if config.mhc_flows == 1:
        raise ValueError("mhc_flows=1: one stream is a residual already; use 2 or more, or mhc_enabled=false")
    specs = closed_specs(config)
    biases = {site: specs[f"{site}.bias"].init("", 0, "cpu", torch.float64) for site in site_names(config)}
    error = max(error for _, error in reading_errors(biases, config))
    if error > READING:
        raise ValueError(
            f"mhc_preset={config.mhc_preset!r}: adds {PRESETS[config.mhc_preset].eps:.0e} in every sum of Sinkhorn, "
            f"so that streams shrink: after {config.num_layers} layers an output is read with a weight off by "
            f"{error:.0e}, not by at most {READING:.0e}; use the preset paper, or mhc_projection=permutations"
        )


def site_names(config: ModelConfig) -> list[str]:
    """The hyper-connections of a model by name, in the order in which they run.

    >>> site_names(ModelConfig(num_layers=1))
    ['layers.0.attn_mhc', 'layers.0.mlp_mhc']
    """
    return [name.removesuffix(".alpha") for name in closed_specs(config) if name.endswith(".alpha")]


def reading_errors(biases: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, float]]:
    """How far each hyper-connection with `alpha = 0` is from a plain residual.

    Mappings are constants then, so streams are sums of the embedding and the outputs before them with constant
    weights. Those are computed by the model's own functions, run on coefficients: the embedding is the first unit
    vector, the output of sub-layer k the one after. Of plain residuals every weight is 1 in what a sub-layer reads,
    and in the mean of the streams.

    Args:
        biases: by name of the hyper-connection, in the order in which they run.
        config: the model's shape.

    Returns:
        name and largest distance from 1, of the head, by which streams are collapsed, under its own or the last name.
    """
    sites = [site for site in biases if site != "head_mhc"]
    unit = torch.eye(len(sites) + 1, dtype=torch.float64, device="cpu")
    hidden = expand(unit[:1], config)
    for count, site in enumerate(sites, 1):
        read: list[Tensor] = []

        def branch(u: Tensor, read: list[Tensor] = read, output: Tensor = unit[count : count + 1]) -> Tensor:
            read.append(u)
            return output

        weights = _without_gates(biases[site], config.mhc_flows * len(unit), 3)
        hidden = hyper_connection(MHCParams(*weights), hidden, branch, config).hidden
        yield site, max(_distance(read[0], count), _distance(hidden.x.mean(-2), count + 1))
    head = MHCHead(*_without_gates(biases["head_mhc"], config.mhc_flows * len(unit), 1)) if "head_mhc" in biases else ()
    unused = Embedding(unit), (), RMSNorm(unit), ()
    yield list(biases)[-1], _distance(collapse(LMParams(*unused, head), hidden, config), len(unit))


def _without_gates(bias: Tensor, width: int, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    bias = bias.double()
    return bias.new_zeros(width, len(bias)), bias.new_zeros(parts), bias


def _distance(coefficients: Tensor, count: int) -> float:
    return (coefficients[..., :count] - 1).abs().max().item()


def _opening(weights: Mapping[str, Tensor], site: str, config: ModelConfig) -> float:
    """By how much logits vary for streams of any direction, the most of pre, post and res."""
    n = config.mhc_flows
    phi, alpha = weights[f"{site}.phi"], weights[f"{site}.alpha"]
    parts = [phi] if len(alpha) == 1 else phi.split([n, n, phi.shape[1] - 2 * n], -1)
    rms = torch.stack([part.square().sum(0).mean().sqrt() if part.numel() else part.new_zeros(()) for part in parts])
    return (alpha.abs() * rms).max().item()  # NaN where a weight is: the max of Python may drop it
