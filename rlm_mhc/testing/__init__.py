"""What tests of this library and of code built on it need: tolerances, comparisons, strategies."""

from rlm_mhc.testing.compare import TOLERANCE, assert_as_accurate, assert_trees_close, largest_difference
from rlm_mhc.testing.models import random_batch, ranks_in_threads, small_config

__all__ = [
    "TOLERANCE",
    "assert_as_accurate",
    "assert_trees_close",
    "largest_difference",
    "random_batch",
    "ranks_in_threads",
    "small_config",
]
