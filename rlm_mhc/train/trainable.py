"""What a run trains of its model, all of it or adapters, and how the model comes from that."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rlm_mhc.checkpoint.adapter import load_adapter, save_adapter
from rlm_mhc.fn import LMParams, cast, lora_init, lora_merge
from rlm_mhc.parallel import checksum
from rlm_mhc.program.precision import COMPUTE_DTYPE
from rlm_mhc.program.weight_source import WeightSource, lora_source
from rlm_mhc.train.finetune_config import FinetuneConfig
from rlm_mhc.train.run_config import RunConfig
from rlm_mhc.tree import tree_map

ADAPTER_FOLDER = "adapter"


class Trainable(NamedTuple):
    """`begin(params)`: what is trained, of a model before any update; `read(folder, params)`: the same, of a checkpoint
    with the model `params`; `write(folder, trained)`: what a checkpoint holds of it beside the model;
    `model_of(trained)`: the model's tree, to run and to save; `facts`: what a run that goes on must have in common
    with its checkpoint, as JSON values; `weight_source`: of the step."""

    begin: Callable[[LMParams], Any]
    read: Callable[[Path, LMParams], Any]
    write: Callable[[Path, Any], object]
    model_of: Callable[[Any], LMParams]
    facts: dict[str, Any]
    weight_source: WeightSource | None = None


def _masters(params: LMParams) -> LMParams:
    return tree_map(lambda leaf: leaf.float(), params)


# All weights, in fp32.
FULL = Trainable(
    begin=_masters,
    read=lambda folder, params: _masters(params),
    write=lambda folder, trained: None,
    model_of=lambda trained: trained,
    facts={},
)


def trainable_of(run: RunConfig, base: Callable[[], LMParams]) -> Trainable:
    """That of a run; `base()` reads the weights that fine-tuning starts from."""
    if not isinstance(run, FinetuneConfig) or run.adapters is None:
        return FULL
    return lora_trainable(run, base())


def lora_trainable(run: FinetuneConfig, weights: LMParams) -> Trainable:
    """Adapters in fp32 to weights that stay as they are, in the dtype that the model is run with.

    A checkpoint holds the merged model, so that it is one as any other, and the adapters as peft has them.
    """
    lora, device = run.lora, weights.norm.weight.device
    base = cast(weights, run.model, COMPUTE_DTYPE[run.training.mixed_precision])
    fresh = lora_init(weights, lora, seed=run.seed)

    def model_of(trained: Any) -> LMParams:
        # A copy that is to be saved may lie on the CPU.
        return lora_merge(base, tree_map(lambda leaf: leaf.to(device), trained), lora.scale)

    return Trainable(
        begin=lambda params: fresh,
        read=lambda folder, params: load_adapter(folder / ADAPTER_FOLDER, fresh, device),
        write=lambda folder, trained: save_adapter(folder / ADAPTER_FOLDER, trained, lora, run.checkpoint),
        model_of=model_of,
        facts={"base": checksum(weights), "lora": {**dataclasses.asdict(lora), "targets": list(lora.targets)}},
        weight_source=lora_source(base, fresh, lora),
    )


def require_same(trainable: Trainable, saved: dict[str, Any], checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint of other adapters, of adapters to other weights, or of none.

    Raises:
        ValueError: saying which.
    """
    before, now = (facts.get("lora", {"rank": 0}) for facts in (saved, trainable.facts))
    for name, value in before.items():
        if value != now.get(name, value):
            raise ValueError(
                f"{checkpoint}: it was trained with lora.{name}={value}, and this run has {now[name]}; give the same, "
                "or start another from it with checkpoint=… and another output_dir"
            )
    if saved.get("base") != trainable.facts.get("base"):
        raise ValueError(
            f"{checkpoint}: its adapters are to other weights than those that checkpoint= names now (their checksum "
            "differs); give the folder that it was started from"
        )
