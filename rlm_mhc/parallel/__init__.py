"""Several processes as ranks of one run: data parallelism, agreement at the start, and a watch over one another."""

from rlm_mhc.parallel.agreement import checksum, code_version, require_agreement
from rlm_mhc.parallel.ranks import (
    ALONE,
    DelayedFlags,
    Ranks,
    all_reduce,
    find_ranks,
    first_before_others,
    from_first,
    gather,
    process_group,
    sum_over_ranks,
)
from rlm_mhc.parallel.watch import watch_ranks

__all__ = [
    "ALONE",
    "DelayedFlags",
    "Ranks",
    "all_reduce",
    "checksum",
    "code_version",
    "find_ranks",
    "first_before_others",
    "from_first",
    "gather",
    "process_group",
    "require_agreement",
    "sum_over_ranks",
    "watch_ranks",
]
