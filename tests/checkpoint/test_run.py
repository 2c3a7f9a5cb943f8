import errno
import shutil
from pathlib import Path

import pytest
import torch

from rlm_mhc import fn
from rlm_mhc.checkpoint import (
    Writer,
    checkpoints,
    load_run,
    newest_whole,
    recover,
    save_run,
    set_aside,
    snapshot,
    verify_run,
)
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
    with pytest.raises(ValueError, match=r"optimizer\.pt: damaged, it has 8 bytes"):
        load_run(path, fn.adamw_init)
    (path / "optimizer.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no optimizer\.pt"):
        load_run(path, fn.adamw_init)


class Malice:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["optimizer.pt", "generators.pt"])
def test_no_pickled_code_runs_even_where_the_manifest_fits(tmp_path, name):
    path, *_ = save(tmp_path, 7)
    torch.save({"step": Malice(tmp_path / "harm")}, path / name)
    assert torch.load(path / name, weights_only=False)
    assert (tmp_path / "harm").exists()
    (tmp_path / "harm").unlink()
    for verify in (True, False):
        with pytest.raises(ValueError, match=name):
            load_run(path, fn.adamw_init, verify=verify)
    assert not (tmp_path / "harm").exists()


def test_the_newest_whole_checkpoint_is_found_and_the_damaged_ones_named(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    said = []
    assert newest_whole(tmp_path, said.append).name == "checkpoint-3"
    weights = tmp_path / "checkpoint-3" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (tmp_path / "checkpoint-2" / "config.json").unlink()
    assert newest_whole(tmp_path, said.append).name == "checkpoint-1"
    assert len(said) == 2
    assert "checkpoint-3/model.safetensors: damaged, its content is not what was written" in said[0]
    assert "checkpoint-2: damaged, it has no config.json" in said[1]
    set_aside(tmp_path / "checkpoint-3", "damaged")
    assert checkpoints(tmp_path)[-1].name == "checkpoint-2"
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="none of its 2 checkpoints is whole"):
        newest_whole(tmp_path, said.append)
    assert newest_whole(tmp_path / "empty", said.append) is None


def test_what_a_killed_save_left_is_cleared_up(tmp_path):
    path, *_ = save(tmp_path, 1)
    path.rename(tmp_path / ".checkpoint-1.old")  # killed between the two renames
    for name in (".checkpoint-2.tmp", ".checkpoint-0.gone"):
        (tmp_path / name).mkdir()
    recover(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    verify_run(path)


def test_an_old_checkpoint_that_was_linked_to_an_archive_gives_way_and_the_archive_stays(tmp_path):
    folder, archive = tmp_path / "checkpoints", tmp_path / "archive"
    save(folder, 1)[0].rename(archive)
    (folder / "checkpoint-1").symlink_to(archive)
    for step in (2, 3):
        save(folder, step, keep=1)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-3"]
    verify_run(archive)


def test_what_cannot_be_removed_stops_neither_saves_nor_resuming(tmp_path, monkeypatch):
    """As on NFS a folder of which a file is open elsewhere."""

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", path)

    save(tmp_path, 1)
    (tmp_path / ".checkpoint-0.gone").mkdir()
    (tmp_path / ".checkpoint-1.old").mkdir()
    monkeypatch.setattr(shutil, "rmtree", refuse)
    for step in (2, 3):
        save(tmp_path, step, keep=1)
    recover(tmp_path)
    assert newest_whole(tmp_path, print).name == "checkpoint-3"
    (tmp_path / ".checkpoint-4.tmp").mkdir()
    with pytest.raises(FileExistsError, match=r"checkpoint-4\.tmp"):
        save(tmp_path, 4)


def test_a_checkpoint_that_cannot_return_to_its_place_is_not_removed(tmp_path):
    (tmp_path / ".checkpoint-1.old").mkdir()
    (tmp_path / "checkpoint-1").symlink_to(tmp_path / "nowhere")
    recover(tmp_path)
    assert (tmp_path / ".checkpoint-1.old").is_dir()


def test_copies_under_other_names_are_the_users_own(tmp_path):
    copies = {"checkpoint-keep-1", "checkpoint-1000-copy-2", "my-checkpoint-7", "checkpoint-1.damaged"}
    for name in copies:
        (tmp_path / name).mkdir()
    for step in (1, 2):
        save(tmp_path, step, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {*copies, "checkpoint-2"}


def test_the_folder_of_checkpoints_is_on_the_disk_with_the_first_of_them(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("rlm_mhc.disk.sync", synced.append)
    save(tmp_path / "run" / "checkpoints", 1)
    assert {tmp_path, tmp_path / "run"} <= set(synced)


def test_equal_runs_give_equal_files(tmp_path):
    a, b = (save(tmp_path / name, 4)[0] for name in "ab")
    for file in a.iterdir():
        assert file.read_bytes() == (b / file.name).read_bytes(), file.name


def test_a_failing_write_is_told_of_and_another_error_is_not_swallowed():
    def fail(error):
        raise error

    said = []
    with Writer(said.append) as writer:
        writer.submit(lambda: fail(OSError(28, "No space left on device")), "checkpoint-1")
        assert writer.wait().errno == 28
        writer.submit(lambda: fail(KeyError("a mistake of ours")), "checkpoint-2")
        with pytest.raises(KeyError, match="ours"):
            writer.wait()
    assert said == ["checkpoint-1 could not be written: [Errno 28] No space left on device"]


def test_a_snapshot_stays_while_the_state_is_updated():
    state = (torch.ones(3), torch.zeros(()))
    copy = snapshot(state)
    state[0].add_(1)
    assert torch.equal(copy[0], torch.ones(3))
