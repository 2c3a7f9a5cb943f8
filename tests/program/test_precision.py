import math

import pytest
import torch

from rlm_mhc.program.precision import (
    INITIAL_SCALE,
    init_loss_scale,
    make_loss_scale,
    next_loss_scale,
    restore_loss_scale,
)

GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)


def test_the_loss_scale_is_1_after_any_number_of_overflows():
    scale = init_loss_scale("fp16", "cpu")
    for _ in range(165):
        scale = next_loss_scale(scale, BAD)
    assert scale == (1.0, 0)
    assert next_loss_scale(scale, GOOD) == (1.0, 1)


def test_the_loss_scale_grows_to_2_to_the_64_and_no_further():
    scale = make_loss_scale(2.0**63, 1999, "cpu")
    for _ in range(2001):
        scale = next_loss_scale(scale, GOOD)
    assert scale == (2.0**64, 0)
    assert next_loss_scale(scale, BAD) == (2.0**63, 0)


@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan, 0.0])
def test_a_broken_loss_scale_is_finite_and_at_least_1_after_a_step(broken):
    for skipped in (GOOD, BAD):
        scale = next_loss_scale(make_loss_scale(broken, 0, "cpu"), skipped).scale
        assert 1 <= scale <= 2.0**64


def test_a_checkpoint_s_loss_scale_is_restored_where_a_run_can_have_left_it():
    assert restore_loss_scale(2.0**20, 1999, "cpu") == (2.0**20, 1999)
    for scale, good_steps in ((0.0, 0), (0.5, 0), (math.inf, 0), (math.nan, 0), (-4.0, 0), (4.0, -1), (4.0, 10**30)):
        assert restore_loss_scale(scale, good_steps, "cpu") == (INITIAL_SCALE, 0)
