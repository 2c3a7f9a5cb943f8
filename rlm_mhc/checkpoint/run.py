"""A training run on disk: numbered checkpoint folders, each complete or absent."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlm_mhc.checkpoint.weights import load_pretrained, save_pretrained
from rlm_mhc.config import ModelConfig
from rlm_mhc.params import LMParams
from rlm_mhc.tree import from_named, named_leaves

OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "trainer_state.json"


class Run(NamedTuple):
    """A loaded checkpoint: parameters, their config, the optimizer's tree, and `trainer_state.json` as a dict."""

    params: LMParams
    config: ModelConfig
    optimizer: Any
    trainer_state: dict[str, Any]


def save_run(
    folder: Path,
    params: LMParams,
    config: ModelConfig,
    optimizer: Any,
    trainer_state: dict[str, Any],
    *,
    keep: int,
    extras: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """Write `folder/checkpoint-<step>`, then remove all but the newest `keep`; returns the new one's path.

    The files go to a temporary sibling that is renamed when all are there, so a folder by that name is whole.
    `trainer_state` must hold `step` and only JSON values; `extras(path)` adds files of the caller's own.

    Raises:
        OSError: when it cannot be written, the disk being full for one; nothing of it is left then.
    """
    from safetensors import SafetensorError

    final = folder / f"checkpoint-{trainer_state['step']}"
    temporary, aside = folder / f".{final.name}.tmp", folder / f".{final.name}.old"
    for stale in (*folder.glob(".checkpoint-*.tmp"), *folder.glob(".checkpoint-*.old")):
        shutil.rmtree(stale)  # of a killed run
    temporary.mkdir(parents=True)
    try:
        save_pretrained(temporary, params, config)
        torch.save({name: leaf.cpu() for name, leaf in named_leaves(optimizer).items()}, temporary / OPTIMIZER_FILE)
        (temporary / STATE_FILE).write_text(json.dumps(trainer_state, indent=2) + "\n", encoding="utf-8")
        extras(temporary)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (RuntimeError, SafetensorError)):  # what torch and safetensors make of a full disk
            raise OSError(f"{final}: cannot be written ({' '.join(str(error).split())[:200]})") from None
        raise
    if final.exists():
        os.replace(final, aside)
    os.replace(temporary, final)
    shutil.rmtree(aside, ignore_errors=True)
    for old in [path for path in checkpoints(folder) if path != final][: 1 - keep or None]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-<step>` folders in a folder, oldest first."""
    found = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := re.search(r"-(\d+)$", path.name))]
    return [path for _, path in sorted(found)]


def load_run(path: Path, optimizer: Callable[[LMParams], Any], device: torch.device | str = "cpu") -> Run:
    """Read what `save_run` wrote; `optimizer(params)` gives a tree of the optimizer's structure.

    Raises:
        FileNotFoundError: when the folder or a file of it is missing.
        ValueError: on a damaged file or one that does not fit.
    """
    params, config = load_pretrained(path, device=device)
    for name in (OPTIMIZER_FILE, STATE_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path}: no {name}, so training cannot go on from it")
    try:
        named = torch.load(path / OPTIMIZER_FILE, map_location=device, weights_only=True)
        state = from_named(optimizer(params), named)
    except Exception as error:
        raise ValueError(f"{path / OPTIMIZER_FILE}: damaged or of another model ({error})") from None
    try:
        trainer_state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        if not isinstance(trainer_state, dict) or not isinstance(trainer_state.get("step"), int):
            raise ValueError("it names no step")
    except ValueError as error:
        raise ValueError(f"{path / STATE_FILE}: damaged ({error})") from None
    return Run(params, config, state, trainer_state)
