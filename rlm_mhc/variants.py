"""What tells one mHC from another: the presets and the parametrisations of `res`, each a row of a table."""

import math
from collections.abc import Callable
from typing import NamedTuple

RES_DIAGONAL_INIT = 0.995
ORTHOSTOCHASTIC_BLOCK = 2


class Projection(NamedTuple):
    """From `raw_size(n)` raw numbers to an `n × n` matrix, by the function of its name in `rlm_mhc.fn.projections`.

    `near_identity(n)` are raw numbers that give a diagonal of about 0.995 and still receive a gradient;
    `fits(n)` says whether there is one for `n` streams, and `needs` says it in words.
    """

    raw_size: Callable[[int], int]
    near_identity: Callable[[int], tuple[float, ...]]
    fits: Callable[[int], bool] = lambda n: n >= 1
    needs: str = "at least 1"


class Preset(NamedTuple):
    """One variant of mHC. All share one core; these are the differences.

    - `projection`: what `res` is made by, unless `ModelConfig.mhc_projection` says otherwise
    - `fixed`: another projection would be another variant, and is refused
    - `gates`: `sigmoid` (`pre = sigmoid(h)`, `post = 2·sigmoid(h)`) or `tanh` (`alpha · tanh(·) + bias` as it is)
    - `eps`: added to `pre`, and in every sum of Sinkhorn
    - `alpha`: its initial value
    - `collapse`: how the streams leave the network: their `mean`, a `learned` sigmoid head, or by the last `pre`
    - `early_pre`: a sub-layer's `pre` comes from the projection of the sub-layer before it; the first reads stream 0
    """

    source: str
    projection: str = "sinkhorn"
    fixed: bool = False
    gates: str = "sigmoid"
    eps: float = 0.0
    alpha: float = 0.01
    collapse: str = "mean"
    early_pre: bool = False


def _diagonal(inside: float, elsewhere: float) -> Callable[[int], tuple[float, ...]]:
    return lambda n: tuple(inside if i == j else elsewhere for i in range(n) for j in range(n))


def _softmax_of_identity(others: int) -> float:
    """The logit `k` of one term beside `others` zeros whose weight is `RES_DIAGONAL_INIT`."""
    return math.log(RES_DIAGONAL_INIT / (1 - RES_DIAGONAL_INIT) * others) if others else 0.0


def _factors(n: int) -> int:
    return n.bit_length() - 1


def _kronecker_start(n: int) -> tuple[float, ...]:
    one = RES_DIAGONAL_INIT ** (1 / max(1, _factors(n)))
    return (math.log(one / (1 - one)),) * _factors(n)


def _skew_size(n: int) -> int:
    wide = ORTHOSTOCHASTIC_BLOCK * n
    return wide * (wide - 1) // 2


def _orthostochastic_start(n: int) -> tuple[float, ...]:
    # Off the diagonal Q is about -2t, so that each of the n - 1 other entries of a row is about 4·block·t². At t = 0
    # their derivative would be zero.
    t = math.sqrt((1 - RES_DIAGONAL_INIT) / (4 * ORTHOSTOCHASTIC_BLOCK * max(1, n - 1)))
    return (t,) * _skew_size(n)


PROJECTIONS = {
    "sinkhorn": Projection(lambda n: n * n, lambda n: _diagonal(_softmax_of_identity(n - 1), 0.0)(n)),
    "permutations": Projection(
        math.factorial,
        lambda n: (_softmax_of_identity(math.factorial(n) - 1), *(0.0,) * (math.factorial(n) - 1)),
        lambda n: 1 <= n <= 4,
        "from 1 to 4, since there are n! permutations",
    ),
    "kronecker": Projection(_factors, _kronecker_start, lambda n: n >= 1 and n & (n - 1) == 0, "a power of 2"),
    "orthostochastic": Projection(_skew_size, _orthostochastic_start),
    "identity": Projection(lambda n: 0, lambda n: ()),
    "unconstrained": Projection(lambda n: n * n, _diagonal(1.0, 0.0)),
}

PRESETS = {
    "paper": Preset("arXiv 2512.24880, section 4"),
    "deepseek_v4": Preset(
        "transformers' DeepseekV4HyperConnection and DeepseekV4HyperHead",
        eps=1e-6,
        alpha=1.0,
        collapse="learned",
    ),
    "single_pass": Preset("DeepSeek-V4.1", eps=1e-6, alpha=1.0, collapse="pre", early_pre=True),
    "identity": Preset("the ablation res = I", projection="identity", fixed=True),
    "hc": Preset("arXiv 2409.19606", projection="unconstrained", fixed=True, gates="tanh"),
    "lite": Preset("arXiv 2601.05732", projection="permutations", fixed=True),
    "kron": Preset("arXiv 2601.21579", projection="kronecker", fixed=True),
    "orthostochastic": Preset("arXiv 2604.02309", projection="orthostochastic", fixed=True),
}


def preset_named(name: str) -> Preset:
    """A row of `PRESETS`.

    Raises:
        ValueError: on an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def projection_named(name: str) -> Projection:
    """A row of `PROJECTIONS`; errors as `preset_named`."""
    if name not in PROJECTIONS:
        raise ValueError(f"projection={name!r}: expected one of {', '.join(PROJECTIONS)}")
    return PROJECTIONS[name]
