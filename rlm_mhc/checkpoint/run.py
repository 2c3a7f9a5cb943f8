"""A training run on disk: numbered checkpoint folders, each whole or absent, with a manifest that tells damage."""

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlm_mhc.checkpoint.config_files import read_json
from rlm_mhc.checkpoint.weights import load_pretrained, require_fit, save_pretrained
from rlm_mhc.config import ModelConfig
from rlm_mhc.disk import CHECKSUM, checksum, discard, make_folder, sync, sync_tree
from rlm_mhc.params import LMParams
from rlm_mhc.tree import from_named, named_leaves
from rlm_mhc.validation import LARGEST

OPTIMIZER_FILE = "optimizer.pt"
GENERATORS_FILE = "generators.pt"
STATE_FILE = "trainer_state.json"
LARGEST_STATE_BYTES = 1 << 26


class Run(NamedTuple):
    """A loaded checkpoint: parameters, their config, the optimizer's tree, `trainer_state.json` as a dict without its
    manifest, and the states of the random generators by rank."""

    params: LMParams
    config: ModelConfig
    optimizer: Any
    trainer_state: dict[str, Any]
    generators: list[dict[str, Any]]


def save_run(
    folder: Path,
    params: LMParams,
    config: ModelConfig,
    optimizer: Any,
    trainer_state: dict[str, Any],
    *,
    keep: int,
    generators: list[dict[str, Any]] | tuple[()] = (),
    extras: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """Write `folder/checkpoint-<step>`, then remove all but the newest `keep`, and those that `set_aside` has as
    `replaced`; returns the new one's path.

    The files go to a temporary sibling, are flushed to the disk, described in a manifest (size and checksum of each,
    in `trainer_state.json`, which carries one of its own), and renamed: a folder by that name is whole, also after a
    crash of the machine. `trainer_state` must hold `step` and only JSON values; `extras(path)` adds files of the
    caller's own.

    Raises:
        OSError: when it cannot be written, the disk being full for one; nothing of it is left then, and those written
            before are as they were.
    """
    final = folder / f"checkpoint-{trainer_state['step']}"
    temporary, aside = folder / f".{final.name}.tmp", folder / f".{final.name}.old"
    make_folder(folder)
    recover(folder)
    try:
        temporary.mkdir()
        save_pretrained(temporary, params, config)
        _save_pickle({name: leaf.cpu() for name, leaf in named_leaves(optimizer).items()}, temporary / OPTIMIZER_FILE)
        _save_pickle(list(generators), temporary / GENERATORS_FILE)
        extras(temporary)
        _write_state(temporary, trainer_state)
        sync_tree(temporary)
        if final.exists():
            os.replace(final, aside)
        os.replace(temporary, final)
        sync(folder)
    except BaseException:
        discard(temporary)
        raise
    discard(aside)
    for old in [path for path in checkpoints(folder) if path != final][: 1 - keep or None]:
        _remove(old)
    for replaced in folder.glob("checkpoint-*.replaced"):
        discard(replaced)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-<step>` folders in a folder, oldest first."""
    named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    found = [(int(match[1]), path) for match, path in named if match]
    return [path for _, path in sorted(found)]


def recover(folder: Path) -> None:
    """Clear up after a killed save: what was half written or half removed goes, and a checkpoint that was moved aside
    for one that never came returns to its place. What the system does not let go of stays, in nobody's way."""
    for aside in folder.glob(".checkpoint-*.old"):
        final = folder / aside.name.removeprefix(".").removesuffix(".old")
        if final.exists():
            discard(aside)
        else:
            with suppress(OSError):
                os.replace(aside, final)
    for stale in (path for kind in ("tmp", "gone") for path in folder.glob(f".checkpoint-*.{kind}")):
        discard(stale)


def newest_whole(folder: Path, say: Callable[[str], object]) -> Path | None:
    """The newest checkpoint that is whole; of each newer one, `say` receives what is wrong with it. None where there
    is no checkpoint at all.

    Raises:
        ValueError: when there are some, and none is whole.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            verify_run(path)
            return path
        except (ValueError, OSError) as error:
            say(f"{error}; it is passed over")
    if found:
        raise ValueError(f"{folder}: none of its {len(found)} checkpoints is whole; start over with overwrite=true")
    return None


def set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint to `<name>.<why>`, where it is in nobody's way and can be looked at: `damaged` for good,
    `replaced` until the next one is whole."""
    target = path.with_name(f"{path.name}.{why}")
    discard(target)
    os.replace(path, target)
    return target


def describe_run(path: Path) -> dict[str, Any]:
    """`trainer_state.json` of a checkpoint, without the manifest.

    Raises:
        FileNotFoundError: when the folder or that file is missing.
        ValueError: when it is damaged.
    """
    return _read_state(path)[0]


def verify_run(path: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with the manifest; returns what `describe_run` does.

    Raises:
        FileNotFoundError: when the folder or a file of it is missing.
        ValueError: naming the first file that is not what was written, and how.
    """
    state, files = _read_state(path)
    for name, written in files.items():
        file = path / name
        if not file.is_file():
            raise FileNotFoundError(f"{path}: damaged, it has no {name}")
        if (size := file.stat().st_size) != written["size"]:
            raise ValueError(f"{file}: damaged, it has {size} bytes and {written['size']} were written")
        if checksum(file) != written[CHECKSUM]:
            raise ValueError(f"{file}: damaged, its content is not what was written (its checksum differs)")
    return state


def load_run(
    path: Path, optimizer: Callable[[LMParams], Any], device: torch.device | str = "cpu", *, verify: bool = True
) -> Run:
    """Read what `save_run` wrote; `optimizer(params)` gives a tree of the optimizer's structure.

    With `verify` every byte is compared with the manifest first. No pickled code is run, with or without.

    Raises:
        FileNotFoundError: when the folder or a file of it is missing.
        ValueError: on a damaged file or one that does not fit.
    """
    trainer_state = verify_run(path) if verify else describe_run(path)
    params, config = load_pretrained(path, device=device, verify=False)
    example = optimizer(params)
    named = _load_pickle(path / OPTIMIZER_FILE, dict, device)
    expected = {name: tuple(leaf.shape) for name, leaf in named_leaves(example).items()}
    strangers = [name for name, leaf in named.items() if not isinstance(leaf, Tensor)]
    if strangers:
        raise ValueError(f"{path / OPTIMIZER_FILE}: {strangers[0]!r} is no tensor")
    require_fit(named, expected, str(path / OPTIMIZER_FILE))
    generators = _load_pickle(path / GENERATORS_FILE, list, "cpu")
    return Run(params, config, from_named(example, named), trainer_state, generators)


def is_run(path: Path) -> bool:
    """Whether a folder holds what training can go on from, and not weights alone."""
    return (path / STATE_FILE).is_file()


def _remove(path: Path) -> None:
    """Remove a checkpoint so that no half of it ever bears its name."""
    gone = path.with_name(f".{path.name}.gone")
    with suppress(OSError):  # a checkpoint too many is no reason to stop
        os.replace(path, gone)
    discard(gone)


def _write_state(folder: Path, trainer_state: Mapping[str, Any]) -> None:
    files = {
        str(file.relative_to(folder)): {"size": file.stat().st_size, CHECKSUM: checksum(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    state = {**trainer_state, "files": files}
    text = json.dumps({**state, CHECKSUM: _state_checksum(state)}, indent=2, allow_nan=False) + "\n"
    (folder / STATE_FILE).write_text(text, encoding="utf-8")


def _read_state(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`trainer_state.json`, and the manifest in it."""
    file = path / STATE_FILE
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such checkpoint folder")
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no {STATE_FILE}, so training cannot go on from it")
    state = read_json(file, LARGEST_STATE_BYTES)
    if state.pop(CHECKSUM, None) != _state_checksum(state):
        raise ValueError(f"{file}: damaged, its content is not what was written (its checksum differs)")
    files, step = state.pop("files", None), state.get("step")
    if not _is_manifest(files) or type(step) is not int or not 0 <= step < LARGEST:
        raise ValueError(f"{file}: its manifest or its step is missing or none, so it is not what `save_run` wrote")
    return state, files


def _is_manifest(files: Any) -> bool:
    return isinstance(files, dict) and all(
        name.isprintable()
        and isinstance(written, dict)
        and type(written.get("size")) is int
        and isinstance(written.get(CHECKSUM), str)
        for name, written in files.items()
    )


def _state_checksum(state: Mapping[str, Any]) -> str:
    import xxhash

    return xxhash.xxh3_128(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _save_pickle(value: Any, file: Path) -> None:
    try:
        torch.save(value, file)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(f"{file}: cannot be written ({' '.join(str(error).split())[:200]})") from None


def _load_pickle(file: Path, kind: type, device: torch.device | str) -> Any:
    try:
        value = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:
        # torch raises many kinds here, for damaged files as for pickles that would run code.
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(f"{file}: damaged, or not of tensors alone ({type(error).__name__}: {reason})") from None
    if not isinstance(value, kind):
        raise ValueError(f"{file}: expected a {kind.__name__}, got a {type(value).__name__}")
    return value
