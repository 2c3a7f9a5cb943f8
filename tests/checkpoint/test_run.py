import pytest
import torch

from rlm_mhc import fn
from rlm_mhc.checkpoint import checkpoints, load_run, save_run
from rlm_mhc.testing import assert_trees_close, small_config
from rlm_mhc.tree import tree_map


def save(folder, step, keep=5):
    config = small_config()
    params = fn.init(config, seed=step)
    optimizer = tree_map(lambda x: x + step, fn.adamw_init(params))
    path = save_run(folder, params, config, optimizer, {"step": step, "position": {"seed": 1}}, keep=keep)
    return path, params, optimizer


def test_round_trip(tmp_path):
    path, params, optimizer = save(tmp_path, 7)
    loaded = load_run(path, fn.adamw_init)
    assert_trees_close(loaded.params, params, 0.0)
    assert_trees_close(loaded.optimizer, optimizer, 0.0)
    assert loaded.trainer_state == {"step": 7, "position": {"seed": 1}}
    assert torch.load(path / "optimizer.pt", weights_only=True)["step"] == 7


def test_the_oldest_go_first_and_numbers_are_not_sorted_as_words(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]


def test_the_one_just_written_stays_even_if_later_ones_are_there(tmp_path):
    for step in (600, 900):
        save(tmp_path, step)
    path, *_ = save(tmp_path, 400, keep=2)
    assert path.is_dir()
    assert len(checkpoints(tmp_path)) == 2
    path, *_ = save(tmp_path, 500, keep=1)
    assert checkpoints(tmp_path) == [path]


def test_saving_again_replaces(tmp_path):
    save(tmp_path, 3)
    path, params, _ = save(tmp_path, 3)
    assert_trees_close(load_run(path, fn.adamw_init).params, params, 0.0)


def test_a_failed_save_leaves_no_checkpoint(tmp_path):
    def fail(folder):
        raise OSError("disk full")

    config = small_config()
    params = fn.init(config)
    with pytest.raises(OSError, match="disk full"):
        save_run(tmp_path, params, config, fn.adamw_init(params), {"step": 1}, keep=1, extras=fail)
    assert list(tmp_path.iterdir()) == []


def test_damaged_run_files_are_named(tmp_path):
    path, *_ = save(tmp_path, 7)
    (path / "optimizer.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"optimizer\.pt: damaged"):
        load_run(path, fn.adamw_init)
    (path / "optimizer.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no optimizer\.pt"):
        load_run(path, fn.adamw_init)
