import os

import pytest

from rlm_mhc.disk import discard, make_folder, replace_file


def write_private(file):
    file.unlink()
    os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))


@pytest.mark.parametrize("left_behind", [False, True])
def test_a_replaced_file_has_the_permissions_of_any_new_one_and_the_mask_is_not_touched(
    tmp_path, monkeypatch, left_behind
):
    """For a moment without a mask, files that other threads make would be everybody's to write."""
    (tmp_path / "new").touch()
    if left_behind:
        (tmp_path / ".file.tmp").touch(mode=0o600)
    monkeypatch.setattr(os, "umask", None)
    replace_file(tmp_path / "file", write_private)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_folders_are_made_with_their_entries_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("rlm_mhc.disk.sync", synced.append)
    make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]
    make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2


def test_what_a_discarded_link_points_to_stays(tmp_path):
    (tmp_path / "archive").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "archive")
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "below").mkdir(parents=True)
    for name in ("link", "file", "folder", "missing"):
        discard(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]
