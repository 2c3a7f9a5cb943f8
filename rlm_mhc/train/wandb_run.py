"""A run's records in Weights & Biases, where a project is named."""

import contextlib
import importlib.util
import inspect
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlm_mhc.config import WandbConfig
from rlm_mhc.disk import replace_file
from rlm_mhc.validation import in_short

# In `output_dir`: the id of the wandb run that resume=auto continues.
ID_FILE = "wandb_run_id"
INIT_SECONDS = 20


def require_wandb(config: WandbConfig) -> None:
    """Check a named project before anything is spent; without one do nothing, and do not import wandb.

    Raises:
        ValueError: when wandb is not installed, or refuses the project's name, its own environment variables or a
            login that it finds.
    """
    if config.project is None:
        return
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"training.wandb.project={config.project}: wandb is not installed; pip install wandb, or leave it out"
        )
    import wandb

    try:
        wandb.Settings(project=config.project, entity=config.entity)
        if _mode() == "online":
            _logged_in()
    except (wandb.errors.Error, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"training.wandb.project={config.project}: wandb refuses it: {reason}") from None


def start_wandb(config: WandbConfig, folder: Path, run: dict[str, Any], *, resume: bool = False) -> Any:
    """Start a wandb run, or with `resume` continue that of the folder; return None where no project is named.

    The mode is `WANDB_MODE`, else online. Without a login, which wandb itself looks up, the run is offline. It is
    offline, too, when the server does not answer within 20 seconds. Nothing is asked on the terminal.
    """
    if config.project is None:
        return None
    import wandb

    mode = _mode()
    if mode == "online" and not _logged_in():
        _say_offline("no login found", folder)
        mode = "offline"
    known = _read_id(folder) if resume else None
    for attempt in (mode, "offline"):
        try:
            wandb_run = wandb.init(
                project=config.project,
                entity=config.entity,
                dir=folder,
                config=run,
                mode=attempt,  # type: ignore[arg-type]
                id=known,
                resume="allow" if known and attempt == "online" else None,
                settings=wandb.Settings(console="off", init_timeout=INIT_SECONDS, silent=True),
            )
        except (wandb.errors.Error, OSError) as error:
            _say_offline((str(error).splitlines() or [in_short(error)])[0], folder)
        else:
            _write_id(folder, wandb_run.id)
            return wandb_run
    return None


def report_to(wandb_run: Any) -> Callable[[dict[str, Any]], object]:
    """A function that logs a record under its own step to a wandb run, or nowhere for None."""
    if wandb_run is None:
        return lambda record: None
    alive = True

    def report(record: dict[str, Any]) -> None:
        nonlocal alive
        alive = alive and _succeeds(lambda: wandb_run.log(record, step=record["step"]))

    return report


def _succeeds(call: Callable[[], object]) -> bool:
    """Call, or print what was raised: wandb works through a process of its own, which may die."""
    try:
        call()
    except Exception as error:
        print(f"wandb        {in_short(error)}; it gets no more records, and the training goes on", flush=True)
        return False
    return True


@contextlib.contextmanager
def finished(wandb_run: Any) -> Iterator[None]:
    """Finish a wandb run at the end of the block, as failed where that raises; nothing for None."""
    exit_code: int | None = 1
    try:
        yield
        exit_code = None
    finally:
        if wandb_run:
            _succeeds(lambda: wandb_run.finish(exit_code=exit_code))


def _mode() -> str:
    """Return `WANDB_MODE` as wandb validates it, `online` by default.

    Raises:
        ValueError: on another value.
    """
    import wandb

    return str(wandb.Settings(mode=os.environ.get("WANDB_MODE") or "online").mode)


def _logged_in() -> bool:
    """Whether wandb finds credentials for its server: in variables, settings or a netrc file."""
    import wandb

    if "prompt" not in inspect.signature(wandb.login).parameters:  # an older wandb, which would ask
        return bool(os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or wandb.api.api_key)
    # Silent: to name the account in its message, it would ask the server.
    wandb.setup(wandb.Settings(silent=True))
    return wandb.login(prompt=False, verify=False)


def _say_offline(why: str, folder: Path) -> None:
    print(f"wandb        {why}; logging offline, to be sent by: wandb sync {folder}/wandb/offline-run-*", flush=True)


def _read_id(folder: Path) -> str | None:
    try:
        text = (folder / ID_FILE).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return text if re.fullmatch(r"[\w-]{1,64}", text) else None


def _write_id(folder: Path, name: str) -> None:
    try:
        replace_file(folder / ID_FILE, lambda file: file.write_text(f"{name}\n", encoding="utf-8"))
    except OSError as error:
        print(f"{folder / ID_FILE} could not be written: {error}; resume=auto will start another wandb run", flush=True)
