import os

from hypothesis import HealthCheck, settings

shared = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", max_examples=25, **shared)
settings.register_profile("ci", max_examples=60, derandomize=True, **shared)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
