"""Llama, Mistral, Qwen2 or Qwen3 as mHC, and back: `python recipes/convert.py source=DIR output_dir=DIR [key=value …]`.

Weights go through memory a file at a time. `source=FILE.gguf` is dequantised to fp32 and held whole.
"""

import dataclasses
import warnings
from pathlib import Path

from rlm_mhc import ModelConfig
from rlm_mhc.checkpoint import load_config
from rlm_mhc.checkpoint.shards import SHARD_BYTES
from rlm_mhc.convert import to_llama, upcycle
from rlm_mhc.params import count
from rlm_mhc.train import command
from rlm_mhc.validation import at_least, check, location, one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What to convert, and for `to_mhc` the hyper-connections to give it."""

    source: str | None = location(None)
    output_dir: str | None = location(None)
    direction: str = one_of("to_mhc", "to_llama")
    mhc_enabled: bool | None = None
    mhc_flows: int | None = at_least(1, None)
    mhc_preset: str | None = None
    mhc_projection: str | None = None
    mhc_sinkhorn_iters: int | None = at_least(1, None)
    max_seq_len: int | None = at_least(1, None)
    seed: int = at_least(0, 42)
    shard_mib: int = at_least(1, SHARD_BYTES >> 20)
    debug: bool = False

    def __post_init__(self) -> None:
        check(self)
        for name in ("source", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name}: name a folder, as in {name}=DIR")
        if self.direction == "to_llama" and self.choices:
            raise ValueError(f"{next(iter(self.choices))}: a choice for direction=to_mhc; leave it out")

    @property
    def choices(self) -> dict[str, object]:
        """The fields of `ModelConfig` that were given."""
        names = [field.name for field in dataclasses.fields(ModelConfig)]
        return {name: value for name in names if (value := getattr(self, name, None)) is not None}


def main(run: ConvertConfig) -> None:
    """Convert, and say what became of it."""
    source, output, shard_bytes = Path(str(run.source)), Path(str(run.output_dir)), run.shard_mib << 20
    if run.direction == "to_llama":
        config = load_config(source)
        kind = to_llama(source, output, shard_bytes=shard_bytes)
        print(f"{output}: {kind}, {count(config.replace(mhc_enabled=False)):,} parameters")
        return
    with warnings.catch_warnings(record=True) as remarks:
        config = upcycle(source, output, seed=run.seed, shard_bytes=shard_bytes, **run.choices)
    for remark in remarks:
        print(f"note: {remark.message}")
    kind = f"{config.mhc_flows} streams of {config.mhc_preset}" if config.mhc_enabled else "no mHC"
    print(f"{output}: {kind}, {config.num_layers} layers, width {config.hidden_dim}, {count(config):,} parameters")


if __name__ == "__main__":
    command(ConvertConfig, __file__, main)
