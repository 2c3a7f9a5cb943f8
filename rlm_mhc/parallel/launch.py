"""Read rank, world size and rendezvous from the variables of torchrun or of a SLURM step."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

# torchrun's own default, for a step without SLURM_JOB_ID.
DEFAULT_PORT = 29500
# Below the range that Linux takes ephemeral ports from.
FIRST_PORT, PORT_COUNT = 10000, 20000


class Launch(NamedTuple):
    """Process `rank` of `world`, the `local`-th of `local_world` on its machine; rank 0 listens on `address:port`."""

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1
    address: str = "localhost"
    port: int = DEFAULT_PORT
    starter: str = ""


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Read rank, world and rendezvous from torchrun's variables, else from those of a SLURM step; alone by default.

    torchrun's variables take precedence, so that it may run inside `srun`. `MASTER_ADDR` and `MASTER_PORT` override
    the first host of the step's node list and a port derived from the job's number. Without `srun`, a batch script or
    an `salloc` shell runs one process.

    Raises:
        ValueError: when `WORLD_SIZE` is above 1 and no variable says which of them this process is, or a variable is
            not of the form that torchrun or SLURM write.

    >>> read_launch({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "2"})[:3]
    (3, 4, 1)
    >>> step = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_NODELIST": "n[07-08]"}
    >>> read_launch(step | {"SLURM_JOB_ID": "123"})[:6]
    (1, 2, 0, 1, 'n07', 10123)
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _of_torchrun(environ)
    if _in_step(environ):
        return _of_slurm(environ)
    if (world := _number(environ, "WORLD_SIZE", 1)) > 1:
        raise ValueError(f"WORLD_SIZE={world} but no RANK: start several processes with torchrun, or srun")
    return Launch()


def expand_hosts(hosts: str) -> Iterator[str]:
    """Yield the names of a SLURM node list, in its order.

    Raises:
        ValueError: when brackets do not match, or hold something other than numbers and ranges.

    >>> list(expand_hosts("node[01-03,7],other-1"))
    ['node01', 'node02', 'node03', 'node7', 'other-1']
    >>> list(expand_hosts("rack[1-2]n[0,3]-ib"))
    ['rack1n0-ib', 'rack1n3-ib', 'rack2n0-ib', 'rack2n3-ib']
    """
    if not re.fullmatch(r"[^\[\],\s]*(\[[^\[\]]*\][^\[\],\s]*)*(,[^\[\],\s]*(\[[^\[\]]*\][^\[\],\s]*)*)*", hosts):
        raise ValueError(f"{hosts!r} is no SLURM node list, such as node[01-03,7],other-1")
    for pattern in re.findall(r"(?:[^\[\],]|\[[^\]]*\])+", hosts):
        yield from _expand(pattern, hosts)


def _expand(pattern: str, hosts: str) -> Iterator[str]:
    before, bracket, rest = pattern.partition("[")
    if not bracket:
        yield pattern
        return
    inside, _, after = rest.partition("]")
    for item in inside.split(","):
        low, high = _range(item, hosts)
        for number in range(int(low), int(high) + 1):
            for end in _expand(after, hosts):
                yield f"{before}{number:0{len(low)}}{end}"


def _range(item: str, hosts: str) -> tuple[str, str]:
    if not (found := re.fullmatch(r"(\d+)(?:-(\d+))?", item)):
        raise ValueError(f"{hosts!r} is no SLURM node list: {item!r} is neither a number nor a range")
    return found[1], found[2] or found[1]


def _of_torchrun(environ: Mapping[str, str]) -> Launch:
    world = _number(environ, "WORLD_SIZE")
    if world == 1:
        return Launch()
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise ValueError(f"WORLD_SIZE={world} but no {', '.join(missing)}: start several processes with torchrun")
    return Launch(
        _number(environ, "RANK"),
        world,
        _number(environ, "LOCAL_RANK"),
        _number(environ, "LOCAL_WORLD_SIZE", 1),
        environ["MASTER_ADDR"],
        _number(environ, "MASTER_PORT"),
        "torchrun",
    )


def _in_step(environ: Mapping[str, str]) -> bool:
    """Whether `srun` started this process. A batch script has a SLURM_PROCID too, but no step."""
    if "SLURM_PROCID" not in environ:
        return False
    script = environ.get("ENVIRONMENT") == "BATCH" or environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return not script or "SLURM_STEP_ID" in environ or "SLURM_STEPID" in environ


def _of_slurm(environ: Mapping[str, str]) -> Launch:
    world = _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1))
    if world == 1:
        return Launch()
    names = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
    hosts = next((environ[name] for name in names if environ.get(name)), "")
    job, step = _number(environ, "SLURM_JOB_ID", -1), _number(environ, "SLURM_STEP_ID", 0)
    port = FIRST_PORT + (job + 1009 * step) % PORT_COUNT if job >= 0 else DEFAULT_PORT
    nodes = max(1, sum(1 for _ in expand_hosts(hosts)))
    return Launch(
        _number(environ, "SLURM_PROCID"),
        world,
        _number(environ, "SLURM_LOCALID", 0),
        -(-world // nodes),
        environ.get("MASTER_ADDR") or next(expand_hosts(hosts), "localhost"),
        _number(environ, "MASTER_PORT", port),
        "srun",
    )


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name) or ("" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text}: expected a whole number, as torchrun and srun set it") from None
