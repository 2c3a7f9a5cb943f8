"""Where a run starts: at the first step, where a checkpoint left off, or with its weights on other data."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlm_mhc.checkpoint import (
    describe_run,
    is_run,
    load_pretrained,
    load_run,
    restore_rng_states,
    seed_generators,
)
from rlm_mhc.checkpoint.run import STATE_FILE
from rlm_mhc.config import ModelConfig
from rlm_mhc.data import Position, Prepared
from rlm_mhc.fn import LMParams, adamw_init
from rlm_mhc.parallel import ALONE, Ranks
from rlm_mhc.program import TrainState, init_train_state
from rlm_mhc.program.precision import LossScale, init_loss_scale, restore_loss_scale
from rlm_mhc.program.state import resume_train_state
from rlm_mhc.train.finetune_config import FinetuneConfig
from rlm_mhc.train.output import CONFIG_FILE, METRICS_FILE, read_config
from rlm_mhc.train.run_config import RunConfig
from rlm_mhc.train.trainable import FULL, Trainable, require_same, trainable_of
from rlm_mhc.tree import tree_map

# What says how and where to run, not what.
NOT_COMPARED = ("output_dir", "resume", "resume_from_checkpoint", "resume_optimizer", "overwrite", "debug")


# Values as `Saver` writes them; what is optional is not in every run's, or not in that of a step to replay.
PLACE = {"position": Position(0)._asdict(), "windows": 0, "sequences_per_step": 0}
OPTIONAL = {
    "tokens": 0,
    "watch": {"skipped": 0, "spikes": 0, "bad_in_a_row": 0, "losses": [0.0]},
    "loss_scale": {"scale": 0.0, "good_steps": 0},
    "lora": {"rank": 0},
}
MOST_SEQUENCES_PER_STEP = 1 << 20


class Start(NamedTuple):
    """State, position of the next sequence, tokens seen so far, what the guard had counted, and what of the model is
    trained."""

    state: TrainState
    position: Position
    tokens: int = 0
    watched: dict[str, Any] = {}  # noqa: RUF012
    trainable: Trainable = FULL


class Loaded(NamedTuple):
    """A checkpoint as a run of `trainable` goes on from it: its state, `trainer_state.json`, the generators by rank."""

    state: TrainState
    saved: dict[str, Any]
    generators: list[dict[str, Any]]
    trainable: Trainable


def initial_state(
    run: RunConfig, checkpoint: Path | None, data: Prepared, device: torch.device, ranks: Ranks = ALONE
) -> Start:
    """A fresh start, for fine-tuning from the weights it names; all of a checkpoint, so that the run is as one that
    never stopped; or its weights alone.

    The weights alone are taken from a folder that holds no more, and with `resume_from_checkpoint` where the data are
    others than the checkpoint's, or `resume_optimizer` says so. What was taken is printed.

    Raises:
        FileNotFoundError: when a file of the checkpoint is missing.
        ValueError: when one is damaged, or of a model of another shape; when the data are others and `resume=auto`
            was to go on with them; when what was consumed is not a whole number of steps of this run.
    """
    seed_generators(run.seed + ranks.rank)
    if checkpoint is None and isinstance(run, FinetuneConfig):
        return _with_weights(run, Path(run.checkpoint), device)
    if checkpoint is None:
        return Start(init_train_state(run.model, run.training, seed=run.seed, device=device), Position(run.seed))
    saved = describe_run(checkpoint) if is_run(checkpoint) else None
    same_data = saved is not None and data.has(saved.get("data"))
    if run.resume == "auto" and saved is not None and not same_data:
        raise ValueError(
            f"{checkpoint}: it was trained on other data, or on sequences of another length "
            f"(data.max_length={saved.get('max_length')}), so there is no place in these to go on from; "
            f"give the same, or take its weights to new data with resume_from_checkpoint={checkpoint} and another "
            "output_dir"
        )
    go_on = same_data if run.resume_optimizer is None else run.resume_optimizer
    if go_on and saved is None:
        raise ValueError(f"{checkpoint}: it holds weights only; leave out resume_optimizer=true")
    if not go_on:
        return _with_weights(run, checkpoint, device)
    _print_changes(run, checkpoint)
    if same_data and saved is not None:
        _require_form(saved, PLACE, checkpoint)
        _require_line_up(run, saved, checkpoint, ranks.world)
    return _go_on(run, checkpoint, same_data, device, ranks)


def load_state(run: RunConfig, checkpoint: Path, device: torch.device, *, verify: bool = True) -> Loaded:
    """All of a checkpoint that a run like `run` left.

    Raises:
        FileNotFoundError: when a file of it is missing.
        ValueError: when one is damaged, or it is of another model, or of other adapters.
    """
    trainable, described = trainable_of(run, partial(_base, run, device)), describe_run(checkpoint)
    _require_form(described, {name: form for name, form in OPTIONAL.items() if name in described}, checkpoint)
    require_same(trainable, described, checkpoint)
    params, config, optimizer, saved, generators = load_run(
        checkpoint, lambda params: adamw_init(_described(trainable.read(checkpoint, params))), device, verify=verify
    )
    _require_shape(run, checkpoint, config)
    trained = trainable.read(checkpoint, params)
    state = resume_train_state(trained, optimizer, saved["step"], _loss_scale(run, saved, device))
    return Loaded(state, saved, generators, trainable)


def _described(trained: Any) -> Any:
    """Move a tree to the meta device: a template for loading needs no memory."""
    return tree_map(lambda leaf: leaf.to("meta"), trained)


def _go_on(run: RunConfig, checkpoint: Path, same_data: bool, device: torch.device, ranks: Ranks) -> Start:
    verified = run.resume == "auto"  # when it was chosen
    state, saved, generators, trainable = load_state(run, checkpoint, device, verify=not verified)
    if ranks.rank < len(generators):
        restore_rng_states(generators[ranks.rank])
    place = "place in the data" if same_data else "not the place in the data, which are others: they start anew"
    print(
        f"resumed      {checkpoint}, step {int(state.step)}: weights, optimizer, schedule, random generators, {place}",
        flush=True,
    )
    if saved.get("torch_version") != torch.__version__:
        print(f"             torch {saved.get('torch_version')} wrote it: the last bits may differ", flush=True)
    position = _position(saved) if same_data else Position(run.seed)
    return Start(state, position, saved.get("tokens", 0), saved.get("watch", {}), trainable)


def _with_weights(run: RunConfig, checkpoint: Path, device: torch.device) -> Start:
    folder = Path(run.output_dir).resolve()
    if (folder / METRICS_FILE).exists() and folder in checkpoint.resolve().parents:
        raise ValueError(
            f"output_dir={run.output_dir}: holds the run that {checkpoint.name} is of, and this one starts at step 0; "
            "choose another folder"
        )
    params = _weights(run, checkpoint, device)
    trainable = trainable_of(run, lambda: params)
    trained = trainable.begin(params)
    state = resume_train_state(trained, adamw_init(trained), 0, init_loss_scale(run.training.mixed_precision, device))
    taken = "weights and tokenizer" if run.data.tokenizer == "auto" else "weights"
    print(f"started from {checkpoint}: its {taken}; optimizer, schedule and data start anew", flush=True)
    return Start(state, Position(run.seed), trainable=trainable)


def _base(run: RunConfig, device: torch.device) -> LMParams:
    assert isinstance(run, FinetuneConfig)
    return _weights(run, Path(run.checkpoint), device)


def _weights(run: RunConfig, checkpoint: Path, device: torch.device) -> LMParams:
    params, config = load_pretrained(checkpoint, device=device)
    _require_shape(run, checkpoint, config)
    return params


def _require_shape(run: RunConfig, checkpoint: Path, config: ModelConfig) -> None:
    if config != run.model:
        pairs = [(f.name, getattr(config, f.name), getattr(run.model, f.name)) for f in dataclasses.fields(config)]
        found = ", ".join(f"it has {name}={a}, model.{name} is {b}" for name, a, b in pairs if a != b)
        raise ValueError(f"{checkpoint}: a model of another shape: {found}")


def _require_line_up(run: RunConfig, saved: dict[str, Any], checkpoint: Path, world: int) -> None:
    """A run of this batch size would have to come by the place where the checkpoint is."""
    position, training = _position(saved), run.training
    consumed = position.epoch * saved["windows"] + position.offset
    per_step = training.sequences_per_step * world
    if consumed % per_step:
        before = saved["sequences_per_step"]
        works = [n for n in range(1, min(4 * before, MOST_SEQUENCES_PER_STEP) + 1) if consumed % n == 0]
        raise ValueError(
            f"{checkpoint}: it consumed {consumed} sequences, which is no whole number of steps of {per_step} "
            f"(training.batch_size={training.batch_size} × gradient_accumulation_steps="
            f"{training.gradient_accumulation_steps} × {world} ranks); {before} as before, or one of "
            f"{', '.join(map(str, works[-8:]))} sequences per step would work"
        )


def _require_form(saved: dict[str, Any], form: dict[str, Any], checkpoint: Path) -> None:
    """Refuse values of other types or without the keys that those of a form have."""
    for name, example in form.items():
        if not _has_form(saved.get(name), example):
            raise ValueError(
                f"{checkpoint / STATE_FILE}: '{name}' is {str(saved.get(name))[:60]!r}, not what a run writes there, "
                f"such as {example!r}"
            )


def _has_form(value: Any, example: Any) -> bool:
    if isinstance(example, dict):
        return isinstance(value, dict) and all(
            name in value and _has_form(value[name], x) for name, x in example.items()
        )
    if isinstance(example, list):
        return isinstance(value, list) and all(_has_form(item, example[0]) for item in value)
    return type(value) is type(example)


def _position(saved: dict[str, Any]) -> Position:
    return Position(*(saved["position"][name] for name in Position._fields))


def _print_changes(run: RunConfig, checkpoint: Path) -> None:
    """Say what differs from the config that the checkpoint was written with."""
    written = read_config(checkpoint / CONFIG_FILE)
    if type(written) is not type(run):
        raise ValueError(f"{checkpoint}: it is of a run of another recipe; choose another output_dir")
    before = dict(_flat(dataclasses.asdict(written)))
    for name, value in _flat(dataclasses.asdict(run)):
        if before[name] != value and name not in NOT_COMPARED:
            print(f"changed      {name}: {before[name]} before, {value} now", flush=True)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _loss_scale(run: RunConfig, saved: dict[str, Any], device: torch.device) -> LossScale | tuple[()]:
    fresh = init_loss_scale(run.training.mixed_precision, device)
    if not fresh or "loss_scale" not in saved:
        return fresh
    written = saved["loss_scale"]
    restored = restore_loss_scale(written["scale"], written["good_steps"], device)
    if restored.scale != written["scale"]:
        print(
            f"             its loss scale of {written['scale']:g} is out of range: reset to {restored.scale:g}",
            flush=True,
        )
    return restored
