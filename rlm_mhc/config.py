"""Frozen, validated configs of the model and its training, and the presets by name."""

import dataclasses
from typing import Any

from rlm_mhc import variants
from rlm_mhc.validation import at_least, between, check, nearest, one_of, positive, section, some_of

MODEL_TYPE = "rlm_mhc"
# Of what the table of weights grows with: beyond any model, and small enough that a file cannot make it fill memory.
MOST_LAYERS, MOST_FLOWS = 10_000, 256
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_dim=128, num_layers=6, num_heads=4, vocab_size=4096, max_seq_len=2048),
    "125m": dict(hidden_dim=768, num_layers=12, num_heads=12, vocab_size=50304, max_seq_len=2048),
    "1b": {},
    "7b": dict(hidden_dim=4096, num_layers=32, num_heads=32, ffn_dim=11008, tie_embeddings=False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a language model whose residual stream is an mHC.

    `num_kv_heads=None` is `num_heads`, `head_dim=None` is `hidden_dim / num_heads`, and `ffn_dim=None` is
    `8/3 · hidden_dim` rounded up to a multiple of 64; after construction the fields hold these numbers. `qkv_bias`
    and `qk_norm` are what Qwen2 and Qwen3 add to Llama: biases of the query, key and value projections, and an RMS
    norm of each head's queries and keys before the rotation.
    `mhc_enabled=False` is the plain pre-norm transformer, without any mHC weight. `mhc_preset` names a variant of
    mHC (`rlm_mhc.variants.PRESETS`), `mhc_projection` what its `res` is made by (`rlm_mhc.fn.projections`; None: as
    the preset has it).

    Raises:
        ValueError: naming the field, its value and what is allowed.

    >>> ModelConfig(hidden_dim=256, num_layers=4, num_heads=4).ffn_dim
    704
    """

    hidden_dim: int = at_least(1, 2048)
    num_layers: int = between(1, MOST_LAYERS, 24)
    num_heads: int = at_least(1, 16)
    num_kv_heads: int | None = at_least(1, None)
    head_dim: int | None = at_least(2, None)
    ffn_dim: int | None = at_least(1, None)
    vocab_size: int = at_least(2, 32000)
    max_seq_len: int = at_least(1, 8192)
    rope_theta: float = positive(10000.0)
    norm_eps: float = positive(1e-6)
    tie_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    mhc_enabled: bool = True
    mhc_flows: int = between(1, MOST_FLOWS, 4)
    mhc_sinkhorn_iters: int = at_least(1, 20)
    mhc_preset: str = one_of(*variants.PRESETS)
    mhc_projection: str | None = one_of(*variants.PROJECTIONS, optional=True)

    def __post_init__(self) -> None:
        check(self)
        if self.head_dim is None and self.hidden_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads}: must divide hidden_dim={self.hidden_dim}, "
                "or set head_dim to choose the width of a head"
            )
        for name, value in _derived(self).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads}: must divide num_heads={self.num_heads}")
        if self.head_width % 2:
            raise ValueError(
                f"head_dim={self.head_dim}: must be even, since rotary embedding turns pairs; "
                f"it is hidden_dim={self.hidden_dim} / num_heads={self.num_heads} unless set"
            )
        if self.mhc_enabled:
            self._check_projection()

    def _check_projection(self) -> None:
        preset, name = variants.PRESETS[self.mhc_preset], self.projection
        if preset.fixed and name != preset.projection:
            raise ValueError(
                f"mhc_projection={name!r}: the preset {self.mhc_preset!r} is that of {preset.projection!r}; "
                "leave one of them out"
            )
        if name == "unconstrained" and not preset.fixed:
            raise ValueError("mhc_projection='unconstrained': this is what mHC is not; use mhc_preset='hc'")
        if not variants.PROJECTIONS[name].fits(self.mhc_flows):
            raise ValueError(f"mhc_flows={self.mhc_flows}: {name} needs {variants.PROJECTIONS[name].needs}")

    @property
    def projection(self) -> str:
        """`mhc_projection` as a str."""
        return self.mhc_projection or variants.PRESETS[self.mhc_preset].projection

    @property
    def mhc_options(self) -> dict[str, Any]:
        """What `fn.mhc_mappings` is to be told, besides weights and streams."""
        return {
            "num_iters": self.mhc_sinkhorn_iters,
            "eps": self.norm_eps,
            "preset": self.mhc_preset,
            "projection": self.projection,
        }

    @property
    def kv_heads(self) -> int:
        """`num_kv_heads` as an int."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """`head_dim` as an int."""
        return self.head_dim or self.hidden_dim // self.num_heads

    @property
    def ffn_width(self) -> int:
        """`ffn_dim` as an int."""
        return self.ffn_dim or _round_up(8 * self.hidden_dim / 3, 64)

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """The config named `tiny`, `125m`, `1b` or `7b`.

        Raises:
            ValueError: on any other name.

        >>> ModelConfig.preset("tiny").hidden_dim
        128
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r}: expected one of {', '.join(PRESETS)}{nearest(str(name), PRESETS)}")
        return cls(**PRESETS[name])

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with other values; sizes that were derived are derived anew, unlike in `dataclasses.replace`.

        >>> ModelConfig().replace(hidden_dim=1024).head_dim
        64
        """
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        derived = {name: None for name, value in _derived(self).items() if kept[name] == value}
        return ModelConfig(**(kept | derived | changes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW: `lr` is the peak of the schedule, `weight_decay` applies to matrices only."""

    type: str = one_of("adamw")
    lr: float = positive(1e-4)
    weight_decay: float = at_least(0, 0.1)
    betas: tuple[float, float] = between(0, 0.999999, (0.9, 0.95))
    eps: float = positive(1e-8)

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Linear warm-up over `warmup_steps` updates, then a cosine down to `min_lr_ratio · lr` at the last update."""

    type: str = one_of("cosine")
    warmup_steps: int = at_least(0, 1000)
    min_lr_ratio: float = between(0, 1, 0.1)

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases: used only when `project` is named."""

    project: str | None = None
    entity: str | None = None

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; the `training` section of the command line.

    One update sees `batch_size × gradient_accumulation_steps` sequences per device.
    `mixed_precision` `bf16` and `fp16` keep fp32 weights and compute on a copy; mHC stays in fp32. `remat` says what a
    layer keeps for its backward: `none` recomputes nothing that is dear, `mhc` all streams but every few layers',
    `full` the whole layer; `gradient_checkpointing=True` means `full`. `attention` names the library whose fused
    kernels are run, `kernels` what mixes the streams of mHC: the reference, the Triton kernels, or what
    `rlm_mhc.train.kernels` picks. After `max_bad_steps` in a row without a finite loss and gradient, none of which
    updates, a run ends; a loss more than `spike_sigmas` standard deviations above the mean of the last ones is reported
    (None: never).

    Raises:
        ValueError: naming the field, its value and what is allowed.

    >>> TrainConfig(optimizer={"lr": 3e-4}, max_steps=100).optimizer.lr
    0.0003
    """

    optimizer: OptimizerConfig = section(OptimizerConfig)
    scheduler: SchedulerConfig = section(SchedulerConfig)
    batch_size: int = at_least(1, 8)
    gradient_accumulation_steps: int = at_least(1, 4)
    max_steps: int = at_least(1, 50000)
    mixed_precision: str = one_of("bf16", "fp16", "fp32")
    gradient_checkpointing: bool = False
    remat: str = one_of("none", "mhc", "full")
    attention: str = one_of("torch", "flash_attn")
    kernels: str = one_of("auto", "reference", "triton")
    max_grad_norm: float = positive(1.0)
    max_bad_steps: int = at_least(1, 10)
    spike_sigmas: float | None = positive(6.0)
    save_steps: int = at_least(1, 1000)
    save_total_limit: int = at_least(1, 5)
    logging_steps: int = at_least(1, 10)
    eval_steps: int = at_least(1, 500)
    eval_batches: int = at_least(1, 16)
    compile: bool = True
    wandb: WandbConfig = section(WandbConfig)

    def __post_init__(self) -> None:
        check(self)
        if self.gradient_checkpointing and self.remat == "mhc":
            raise ValueError("gradient_checkpointing=True means remat='full', but remat='mhc' was given; leave one out")

    def remat_policy(self, model: ModelConfig) -> str:
        """`remat`, with `gradient_checkpointing` taken into account.

        Raises:
            ValueError: for `mhc` on a model without mHC.
        """
        if self.remat == "mhc" and not model.mhc_enabled:
            raise ValueError("remat='mhc' rebuilds mHC streams, and the model has none; use none or full")
        return "full" if self.gradient_checkpointing else self.remat

    @property
    def sequences_per_step(self) -> int:
        """Sequences that one device consumes per update."""
        return self.batch_size * self.gradient_accumulation_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of that `rank` to the weights `targets` (`all`: every product of the layers), whose product counts
    `alpha / rank` times; with `train_mhc` the weights of mHC are trained as well. Rank 0: no adapters, all weights are
    trained.

    Raises:
        ValueError: naming the field, its value and what is allowed.

    >>> LoraConfig(rank=8, targets=["q_proj", "v_proj"]).scale
    2.0
    """

    rank: int = at_least(0, 0)
    alpha: float = positive(16.0)
    targets: tuple[str, ...] = some_of(*LORA_TARGETS)
    train_mhc: bool = True

    def __post_init__(self) -> None:
        check(self)
        unused = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if not self.rank and unused:
            raise ValueError(f"{unused[0]}={getattr(self, unused[0])}: of no effect with rank=0; set the rank too")

    @property
    def scale(self) -> float:
        """`alpha / rank`."""
        return self.alpha / self.rank


def _derived(config: ModelConfig) -> dict[str, Any]:
    return {
        "mhc_projection": variants.PRESETS[config.mhc_preset].projection,
        "num_kv_heads": config.num_heads,
        "head_dim": config.hidden_dim // config.num_heads,
        "ffn_dim": _round_up(8 * config.hidden_dim / 3, 64),
    }


def _round_up(size: float, multiple: int) -> int:
    return -int(-size // multiple) * multiple
