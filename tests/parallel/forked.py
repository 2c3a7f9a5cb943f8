"""Runs of two ranks under torchrun's agent, and under SLURM's variables, that are signalled and killed:
`python forked.py FOLDER [key=value …]`; every run's folder is FOLDER/NAME/run.

The agent is torchrun's. Agents and workers are forked from this process, which has imported what they need: torchrun
would import it again in every worker.
"""

import contextlib
import importlib
import os
import runpy
import signal
import sys
import time
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from rlm_mhc.train import device

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain_1b.py"
ROUNDS = 10
IMPORTED = [
    "hydra.main",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "torch._inductor.compile_fx",
    "torch.distributed.elastic.multiprocessing.errors",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
]


def main(folder, arguments):
    for name in IMPORTED:
        importlib.import_module(name)
    device.product_rate = lambda *_: 1e9  # seconds of every start
    for number in range(ROUNDS):
        terminated(folder / f"terminated-{number}", [*arguments, "training.max_steps=100000"])
    short = [*arguments, "training.max_steps=16", "training.save_steps=4", "resume=auto"]
    whole(folder / "whole", short)
    killed(folder / "killed", short)
    under_slurm(folder / "slurm", short)


def terminated(folder, arguments):
    """SIGTERM to agent and workers at once, as a batch system sends it."""
    pid = in_child(folder, agent, arguments, 0, worker_to_its_end)
    wait_until(lambda: logged(folder) > 1)
    for process in [pid, *children(pid)]:
        os.kill(process, signal.SIGTERM)
    os.waitpid(pid, 0)


def whole(folder, arguments):
    """Nothing happens."""
    os.waitpid(in_child(folder, agent, arguments, 0), 0)


def killed(folder, arguments):
    """A worker is killed, and after the restart the other one."""
    pid = in_child(folder, agent, arguments, 2)
    for rank, checkpoint in ((1, 4), (0, 8)):
        wait_until(lambda checkpoint=checkpoint: (folder / f"run/checkpoints/checkpoint-{checkpoint}").is_dir())
        os.kill(int((folder / f"pid-{rank}").read_text()), signal.SIGKILL)
    os.waitpid(pid, 0)


def under_slurm(folder, arguments):
    """Two processes with the variables of a step of `srun`, and no torchrun."""
    job = {"SLURM_NTASKS": "2", "SLURM_NODELIST": "localhost,[1-2]none", "SLURM_JOB_ID": str(os.getpid())}
    tasks = [job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    for pid in [in_child(folder, worker, arguments, task) for task in tasks]:
        os.waitpid(pid, 0)


def in_child(folder, function, *arguments):
    folder.mkdir(exist_ok=True)
    if pid := os.fork():
        return pid
    os.chdir(folder)
    with contextlib.suppress(BaseException):
        function(*arguments)
    os._exit(0)


def worker(arguments, environment=()):
    os.environ.update(environment)
    if "RANK" in os.environ:
        Path(f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    sys.argv = [str(RECIPE), *arguments, "output_dir=run"]
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            os._exit(ended.code)  # the agent waits for a value of a worker that raises SystemExit


def worker_to_its_end(arguments):
    worker(arguments)
    os._exit(0)  # an agent that is itself terminated takes no value, for which a forked worker would wait 30 s


def agent(arguments, restarts, run=worker):
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        max_restarts=restarts,
    )
    elastic_launch(config, run)(arguments)


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def logged(folder):
    metrics = folder / "run" / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def wait_until(holds, seconds=300):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
