"""Profiles: `dev` is fast, `ci` thorough and the same every time; choose with `--hypothesis-profile=ci`. `fuzz` runs
for long; `mutations` is for `mutations.py`: a few examples, the first failure as it is."""

import functools
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from jaxtyping import config as jaxtyping_config

pytest_plugins = ["rlm_mhc.testing.fixtures"]

SHAPES_CHECKED = 25  # examples of a law, as many as `dev` draws: to check shapes takes half of the time of an example
shared = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", max_examples=SHAPES_CHECKED, **shared)
settings.register_profile("ci", max_examples=200, derandomize=True, **shared)
settings.register_profile("fuzz", max_examples=5000, **shared)
settings.register_profile("mutations", max_examples=12, derandomize=True, phases=[Phase.generate], **shared)
# The option, where it is given, comes after this and wins.
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Check shapes in the first examples of a law."""
    law = getattr(item.function, "hypothesis", None)
    if law is None or jaxtyping_config.jaxtyping_disable:
        return (yield)
    plain, drawn = law.inner_test, 0

    @functools.wraps(plain)
    def counted(*args, **kwargs):
        nonlocal drawn
        drawn += 1
        jaxtyping_config.update("jaxtyping_disable", drawn > SHAPES_CHECKED)
        return plain(*args, **kwargs)

    law.inner_test = counted
    try:
        return (yield)
    finally:
        law.inner_test = plain
        jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors here have a few hundred numbers: other threads only get in the way, much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
