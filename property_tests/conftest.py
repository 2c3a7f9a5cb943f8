import os

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import config as jaxtyping_config

shared = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", max_examples=25, **shared)
settings.register_profile("ci", max_examples=60, derandomize=True, **shared)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture
def no_shape_checks():
    """The shape hook breaks under torch.compile: laws of compiled functions ask for this."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)
