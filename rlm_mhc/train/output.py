"""A run's folder: refused when it holds another run, unless told to go on or to start over."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from rlm_mhc.checkpoint import checkpoints, newest_whole, recover, set_aside
from rlm_mhc.checkpoint.config_files import YAML_FILE as CONFIG_FILE
from rlm_mhc.checkpoint.config_files import read_yaml
from rlm_mhc.disk import replace_file
from rlm_mhc.train.finetune_config import FinetuneConfig
from rlm_mhc.train.run_config import RunConfig
from rlm_mhc.validation import build

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
CHECKPOINTS = "checkpoints"
BAD_STEPS = "bad_steps"


def open_output(run: RunConfig) -> Path | None:
    """Check that the run may use `output_dir`, and make it; returns the checkpoint to go on from, if any.

    With `resume=auto` that is the newest whole one; what is wrong with newer ones is printed.

    Raises:
        ValueError: when the folder already holds a run, or is no folder, or has checkpoints but none that is whole.
        FileNotFoundError: when `resume_from_checkpoint` names none.
    """
    folder = Path(run.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={folder}: a file is in its place; choose another folder")
    start = _named_checkpoint(run.resume_from_checkpoint) if run.resume_from_checkpoint else None
    used = (folder / METRICS_FILE).exists() or (folder / CHECKPOINTS).exists()
    if used and run.resume != "auto" and not run.overwrite and not _inside(start, folder):
        raise ValueError(
            f"output_dir={folder}: already holds a run; choose another folder, "
            "go on with resume=auto, or start over with overwrite=true"
        )
    if run.resume == "auto":
        start = newest_whole(folder / CHECKPOINTS, lambda line: print(f"damaged      {line}", flush=True))
    folder.mkdir(parents=True, exist_ok=True)
    return start


def begin_output(run: RunConfig, start: Path | None) -> Path:
    """Write `config.yaml`, and remove what the run is to write anew: everything but the tokens, or where it goes on
    from a checkpoint of the folder, the checkpoints after that one; those that `resume=auto` found damaged are
    renamed instead."""
    folder = Path(run.output_dir)
    if start is not None and _inside(start, folder):
        recover(folder / CHECKPOINTS)
        after = [path.resolve() for path in checkpoints(folder / CHECKPOINTS)]
        for path in after[after.index(start.resolve()) + 1 :] if start.resolve() in after else ():
            if run.resume == "auto":
                print(f"damaged      {path} is now {set_aside(path).name}", flush=True)
            else:
                shutil.rmtree(path)
    elif run.overwrite:
        for name in (METRICS_FILE, CURVES_FILE):
            (folder / name).unlink(missing_ok=True)
        for name in (CHECKPOINTS, BAD_STEPS):
            shutil.rmtree(folder / name, ignore_errors=True)
    write_config(run, folder / CONFIG_FILE)
    return folder


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


def _inside(start: Path | None, folder: Path) -> bool:
    return start is not None and folder.resolve() in start.resolve().parents
