"""A run's folder: refused when it holds another run, unless told to go on or to start over."""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from rlm_mhc.checkpoint import checkpoints, describe_run, is_run, newest_whole, recover, set_aside
from rlm_mhc.checkpoint.config_files import YAML_FILE as CONFIG_FILE
from rlm_mhc.checkpoint.config_files import read_yaml
from rlm_mhc.disk import discard, make_folder, replace_file, sync
from rlm_mhc.parallel import ALONE, Ranks, from_first
from rlm_mhc.train.finetune_config import FinetuneConfig
from rlm_mhc.train.lock import locked
from rlm_mhc.train.run_config import RunConfig
from rlm_mhc.train.wandb_run import ID_FILE
from rlm_mhc.validation import build

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
CHECKPOINTS = "checkpoints"
BAD_STEPS = "bad_steps"
# The checkpoints that overwrite=true removes, until that is done.
GONE = f".{CHECKPOINTS}.gone"


@contextmanager
def open_output(run: RunConfig, ranks: Ranks = ALONE) -> Iterator[Path | None]:
    """Make `output_dir`, and hold it until the context is left; gives the checkpoint to go on from, if any.

    With `resume=auto` that is the newest whole one; what is wrong with newer ones is printed. All of it is done by the
    first rank.

    Raises:
        ValueError: when another process holds the folder, when it already holds a run, or is no folder, or has
            checkpoints but none that is whole.
        FileNotFoundError: when `resume_from_checkpoint` names none.
    """
    with ExitStack() as held:
        yield from_first(ranks, lambda: _open(run, held))


def _open(run: RunConfig, held: ExitStack) -> Path | None:
    folder = Path(run.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={folder}: a file is in its place; choose another folder")
    start = _named_checkpoint(run.resume_from_checkpoint) if run.resume_from_checkpoint else None
    make_folder(folder)
    held.enter_context(locked(folder))
    recover(folder / CHECKPOINTS)
    if run.resume == "auto":
        return newest_whole(folder / CHECKPOINTS, lambda line: print(f"damaged      {line}", flush=True))
    if not run.overwrite:
        _require_nothing_lost(folder, start)
    return start


def _require_nothing_lost(folder: Path, start: Path | None) -> None:
    if start is not None and _inside(start, folder):
        if later := _later(folder, start):
            raise ValueError(
                f"output_dir={folder}: it has {len(later)} checkpoints after {start.name}, up to {later[-1].name}; "
                "choose another folder, or have them replaced with overwrite=true"
            )
    elif (folder / METRICS_FILE).exists() or (folder / CHECKPOINTS).exists():
        raise ValueError(
            f"output_dir={folder}: already holds a run; choose another folder, "
            "go on with resume=auto, or start over with overwrite=true"
        )


def begin_output(run: RunConfig, start: Path | None) -> Path:
    """Write `config.yaml`, and remove what the run is to write anew: everything but the tokens.

    Where it goes on from a checkpoint of the folder, those after that one are renamed, and the rest stays: to
    `….damaged` what `resume=auto` found so, to `….replaced` the others, which go once a new checkpoint is whole.
    """
    folder = Path(run.output_dir)
    discard(folder / GONE)
    if start is not None and _inside(start, folder):
        why = "damaged" if run.resume == "auto" else "replaced"
        for path in reversed(_later(folder, start)):  # so that the newest left is one before, wherever this ends
            print(f"{why:<13}{path} is now {set_aside(path, why).name}", flush=True)
    elif run.overwrite:
        _start_over(folder)
    write_config(run, folder / CONFIG_FILE)
    return folder


def _start_over(folder: Path) -> None:
    """The checkpoints go first, all at once: wherever this ends, nothing can go on from them."""
    with suppress(FileNotFoundError):
        os.replace(folder / CHECKPOINTS, folder / GONE)
    sync(folder)
    for name in (METRICS_FILE, CURVES_FILE, ID_FILE):
        (folder / name).unlink(missing_ok=True)
    for name in (GONE, BAD_STEPS):
        discard(folder / name)


def write_config(run: RunConfig, file: Path) -> None:
    """The whole config as resolved, as YAML that can be read back."""
    from omegaconf import OmegaConf

    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(run)))
    text = OmegaConf.to_yaml(OmegaConf.create(values))
    replace_file(file, lambda path: path.write_text(text, encoding="utf-8"))


def read_config(file: Path) -> RunConfig:
    """What `write_config` wrote.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the file, when it is not the YAML of a config.
    """
    values = read_yaml(file)
    kind = FinetuneConfig if isinstance(values, dict) and "checkpoint" in values else RunConfig
    try:
        return build(kind, values)
    except ValueError as error:
        raise ValueError(f"{file}: not a config of this library ({' '.join(str(error).split())})") from None


def _named_checkpoint(name: str) -> Path:
    path = Path(name)
    if not path.is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint={name}: no such folder")
    return path


def _inside(start: Path, folder: Path) -> bool:
    return folder.resolve() in start.resolve().parents


def _later(folder: Path, start: Path) -> list[Path]:
    """The checkpoints of the folder after another one that lies in it."""
    step = describe_run(start)["step"] if is_run(start) else 0
    return [path for path in checkpoints(folder / CHECKPOINTS) if int(path.name.rpartition("-")[2]) > step]
