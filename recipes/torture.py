"""Kill a run again and again, go on with `resume=auto`, and compare it with one that was never killed:
`python recipes/torture.py --kills 50 [key=value …]`.

The kills (SIGKILL, to the whole process group) come at random moments: while the program starts, between two steps,
and, every second one, while a checkpoint is being written. Further arguments go to `recipes/pretrain_1b.py`, as do
`training.compile=true` or a larger model. The exit code is 0 where nothing differs.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from rlm_mhc.disk import checksum
from rlm_mhc.testing.runs import SMALL_RUN, read_metrics, write_corpus
from rlm_mhc.train.safe_stream import install_safe_streams

PRETRAIN = Path(__file__).with_name("pretrain_1b.py")
OUT = "run"
STEPS_PER_KILL = 16
SPEED = ("tokens_per_sec", "mfu", "save_stall")
# Long enough to save every few steps, short enough to be killed in each phase.
RUN = [
    *SMALL_RUN,
    f"output_dir={OUT}",
    "data.train_path=../data.jsonl",
    "data.cache_dir=tokens",
    "training.save_steps=3",
    "training.save_total_limit=3",
    "training.eval_steps=5",
    "training.logging_steps=2",
    "resume=auto",
]


def main(kills: int, seed: int, overrides: list[str]) -> int:
    """Run, kill, compare; returns the number of differences."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as work:
        whole, killed = Path(work, "whole"), Path(work, "killed")
        command = [sys.executable, str(PRETRAIN), *RUN, f"training.max_steps={STEPS_PER_KILL * kills}", *overrides]
        whole.mkdir()
        killed.mkdir()
        write_corpus(Path(work, "data.jsonl"), 200)
        began = time.monotonic()
        finish(command, whole)
        lifetime = time.monotonic() - began
        print(f"never killed: {steps(whole)} steps in {lifetime:.0f} s", flush=True)
        done = differences = 0
        while done < kills:
            if complete(killed, STEPS_PER_KILL * kills):  # too soon: compare, and kill another run
                differences += compare(whole / OUT, killed / OUT)
                shutil.rmtree(killed / OUT)
            moment, when = choose_moment(rng, done)
            if kill_at(command, killed, moment):
                done += 1
                print(f"kill {done}: {when}, {steps(killed)} steps logged", flush=True)
        finish(command, killed)
        differences += compare(whole / OUT, killed / OUT)
    print(f"{kills} kills, {differences} differences")
    return differences


def choose_moment(rng: random.Random, number: int) -> tuple[Callable[[Path], bool], str]:
    """A function that says when, and what it waits for in words."""
    kind, delay = ("start", "save", "step", "save")[number % 4], rng.random()
    if kind == "start":
        seconds = 8 * delay
        return after(lambda folder: True, seconds), f"{seconds:.1f} s after the start"
    if kind == "save":
        seconds = 0.03 * delay
        return after(partial(saving, time.time()), seconds), f"{1000 * seconds:.0f} ms into a save"
    seconds = 2 * delay
    before: list[int] = []

    def stepping(folder: Path) -> bool:
        before.append(steps(folder))
        return before[-1] > before[0]

    return after(stepping, seconds), f"{seconds:.1f} s after a step"


def after(event: Callable[[Path], bool], seconds: float) -> Callable[[Path], bool]:
    """True once so many seconds have passed since the event was first seen."""
    seen: list[float] = []

    def due(folder: Path) -> bool:
        if not seen and event(folder):
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= seconds

    return due


def saving(since: float, folder: Path) -> bool:
    """Whether a checkpoint is being written that was begun after `since`: the last kill may have left another."""
    with suppress(FileNotFoundError):  # whole, and renamed, between two looks
        return any(path.stat().st_ctime > since for path in (folder / OUT / "checkpoints").glob(".checkpoint-*.tmp"))
    return False


def kill_at(command: list[str], folder: Path, due: Callable[[Path], bool]) -> bool:
    """Start the run and kill it when it is due; false where it ended before."""
    process = start(command, folder)
    while process.poll() is None:
        if due(folder):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.001)
    require_success(process, folder)
    return False


def start(command: list[str], folder: Path) -> "subprocess.Popen[bytes]":
    """The run as a process group of its own, its output in a file."""
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def finish(command: list[str], folder: Path) -> None:
    """Let the run come to its end."""
    process = start(command, folder)
    process.wait()
    require_success(process, folder)


def require_success(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Stop where a run failed by itself."""
    if process.returncode:
        print((folder / "log").read_text(errors="replace"), file=sys.stderr)
        raise SystemExit(f"error: a run failed by itself, with code {process.returncode}")


def complete(folder: Path, total: int) -> bool:
    """Whether the last checkpoint is there."""
    return (folder / OUT / "checkpoints" / f"checkpoint-{total}").is_dir()


def steps(folder: Path) -> int:
    """The lines of `metrics.jsonl`, whole or not."""
    file = folder / OUT / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def compare(whole: Path, killed: Path) -> int:
    """Print and count what differs: records but for their speed, files by name and content."""
    found = []
    a, b = (
        [{key: value for key, value in row.items() if key not in SPEED} for row in read_metrics(folder)]
        for folder in (whole, killed)
    )
    if [r["step"] for r in a] != [r["step"] for r in b]:
        found.append(f"steps logged: {[r['step'] for r in a]} and {[r['step'] for r in b]}")
    found += [f"record {x['step']}: {x} and {y}" for x, y in zip(a, b, strict=False) if x != y]
    files = [{path.relative_to(folder) for path in (folder / "checkpoints").rglob("*")} for folder in (whole, killed)]
    found += [f"only in one: {path}" for path in sorted(files[0] ^ files[1])]
    both = [path for path in sorted(files[0] & files[1]) if (whole / path).is_file()]
    found += [f"{path}: other content" for path in both if checksum(whole / path) != checksum(killed / path)]
    for line in found:
        print(line, flush=True)
    return len(found)


if __name__ == "__main__":
    install_safe_streams()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments, rest = parser.parse_known_args()
    if arguments.kills < 1:
        parser.error("--kills: at least 1")
    sys.exit(min(main(arguments.kills, arguments.seed, rest), 1))
