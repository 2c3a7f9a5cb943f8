"""Ten runs of two ranks under torchrun's agent, each ended by SIGTERM to agent and workers at once, as a batch system
sends it: `python terminated.py FOLDER ROUNDS [key=value …]`; prints one line of JSON per run.

The agent is torchrun's. Agents and workers are forked from this process, which has imported what they need: torchrun
would import it again in every worker.
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain_1b.py"

IMPORTED = [
    "hydra.main",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "rlm_mhc.train",
    "torch._inductor.compile_fx",
    "torch.distributed.elastic.multiprocessing.errors",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
]


def worker(arguments):
    sys.argv = [str(RECIPE), *arguments]
    with contextlib.suppress(SystemExit):
        runpy.run_path(str(RECIPE), run_name="__main__")
    os._exit(0)  # what multiprocessing does at the end of a fork waits for threads that the fork has not


def agent(arguments):
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        max_restarts=0,
    )
    elastic_launch(config, worker)(arguments)


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def terminate_one(folder, arguments):
    """Start a run, wait until it has logged a few steps, signal all its processes; returns what is left of it."""
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            agent([*arguments, f"output_dir={folder}"])
        os._exit(0)
    metrics, end = folder / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") > 3) and time.monotonic() < end:
        time.sleep(0.02)
    for process in [pid, *children(pid)]:
        os.kill(process, signal.SIGTERM)
    os.waitpid(pid, 0)
    logged = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    return {"checkpoints": [path.name for path in folder.glob("checkpoints/*")], "logged": logged[-1]}


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    for number in range(int(sys.argv[2])):
        print(json.dumps(terminate_one(Path(sys.argv[1]) / f"run-{number}", sys.argv[3:])), flush=True)
