import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rlm_mhc.data import Position, hold_out, next_batch
from rlm_mhc.data.packing import windows

streams = st.integers(2, 400).map(np.arange)


def targets_of(data):
    rows = [data.inputs_and_targets(i)[1] for i in range(data.total)]
    return [t for row in rows for t in row.tolist() if t != -100]


@given(streams, st.integers(1, 50))
def test_packing_makes_every_token_but_the_first_a_target_once(tokens, length):
    assert targets_of(windows(tokens, length)) == tokens[1:].tolist()


@given(streams, st.integers(1, 50))
def test_every_target_follows_its_input(tokens, length):
    data = windows(tokens, length)
    for i in range(data.total):
        inputs, targets = data.inputs_and_targets(i)
        counted = targets != -100
        assert (targets[counted] == inputs[counted] + 1).all()


@given(streams, st.integers(1, 50))
def test_holding_out_loses_no_window(tokens, length):
    whole = windows(tokens, length)
    train, held_out = hold_out(whole)
    assert targets_of(train) + targets_of(held_out) == targets_of(whole)
    assert train.total >= 1


@given(st.integers(2, 60), st.integers(0, 2**31), st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_an_epoch_is_a_permutation_however_it_is_cut(count, seed, sizes):
    data, position, seen = windows(np.arange(count + 1), 1), Position(seed), []
    for size in sizes:
        batch, position = next_batch(data, position, size)
        seen += batch.tokens[:, 0].tolist()
    for start in range(0, len(seen), count):
        epoch = seen[start : start + count]
        assert len(set(epoch)) == len(epoch)
    assert position.epoch * count + position.offset == sum(sizes)
