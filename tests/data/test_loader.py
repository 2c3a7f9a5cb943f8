import numpy as np
import pytest
import torch

from rlm_mhc.data import Position, eval_batches, next_batch
from rlm_mhc.data.packing import windows


def test_an_epoch_draws_every_window_once_in_another_order_each_time():
    data, position, orders = windows(np.arange(41), 4), Position(seed=3), []
    for _ in range(2):
        firsts = []
        for _ in range(5):
            batch, position = next_batch(data, position, 2)
            firsts += batch.tokens[:, 0].tolist()
        assert sorted(firsts) == list(range(0, 40, 4))
        orders.append(firsts)
    assert orders[0] != orders[1]
    assert position == Position(seed=3, epoch=2, offset=0)


def test_a_position_is_all_there_is_to_resume_from():
    data, position = windows(np.arange(101), 7), Position(seed=1)
    batches = []
    for _ in range(9):
        batch, position = next_batch(data, position, 4)
        batches.append((batch, position))
    resumed, end = next_batch(data, Position(*batches[3][1]), 4)
    assert torch.equal(resumed.tokens, batches[4][0].tokens)
    assert end == batches[4][1]


def test_batches_do_not_depend_on_how_they_are_cut():
    data = windows(np.arange(101), 7)
    whole, _ = next_batch(data, Position(seed=0), 12)
    first, middle = next_batch(data, Position(seed=0), 5)
    second, _ = next_batch(data, middle, 7)
    assert torch.equal(whole.tokens, torch.cat([first.tokens, second.tokens]))


def test_unshuffled_data_comes_in_order():
    batch, _ = next_batch(windows(np.arange(21), 5), Position(seed=0), 4, shuffle=False)
    assert batch.tokens.flatten().tolist() == list(range(20))
    assert batch.targets.flatten().tolist() == list(range(1, 21))


def test_evaluation_is_the_same_every_time_and_spread_out():
    data = windows(np.arange(401), 4)
    first, second = (list(eval_batches(data, 3, 4)) for _ in range(2))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, second, strict=True))
    starts = torch.cat([b.tokens[:, 0] for b in first])
    assert (len(starts), starts[0], starts[-1]) == (12, 0, 396)
    few = list(eval_batches(windows(np.arange(9), 4), 3, 4))
    assert sum(len(b.tokens) for b in few) == 2


def test_nothing_to_predict_is_refused():
    with pytest.raises(ValueError, match="fewer than two tokens"):
        next_batch(windows(np.arange(1), 4), Position(seed=0), 1)
