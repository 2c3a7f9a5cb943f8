import pytest
import torch
import torch.distributed as dist

from rlm_mhc.parallel import Ranks, checksum, code_version, find_ranks, require_agreement


def test_checksum_sees_values_shapes_and_dtypes():
    tree = {"a": torch.arange(6.0), "b": torch.tensor(3)}
    same = {"a": torch.arange(6.0), "b": torch.tensor(3)}
    assert checksum(tree) == checksum(same)
    others = [
        tree | {"a": torch.arange(6.0).view(2, 3)},
        tree | {"a": torch.arange(6.0).double()},
        tree | {"b": torch.tensor(4)},
        tree | {"a": torch.arange(6.0).flip(0)},
        tree | {"a": torch.nextafter(torch.arange(6.0), torch.tensor(9.0))},
    ]
    assert len({checksum(tree), *map(checksum, others)}) == 6


def test_one_rank_agrees_with_itself_without_looking():
    require_agreement(Ranks(), lambda: pytest.fail("it looked"))


def test_the_first_difference_is_named(monkeypatch):
    def gather(into, facts):
        into[:] = [facts, facts | {"code": "other"}]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(ValueError, match="rank 1 differs from rank 0 in code"):
        require_agreement(Ranks(0, 2), lambda: {"config": "c", "code": code_version()})


def test_several_processes_without_torchrun_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun"):
        find_ranks()


def test_checksum_takes_views_of_any_layout():
    x = torch.arange(9, dtype=torch.bfloat16)
    assert checksum((x[1:5],)) == checksum((x[1:5].clone(),))
    y = torch.arange(12.0).view(3, 4)
    assert checksum((y.mT,)) == checksum((y.mT.contiguous(),)) != checksum((y,))
    assert checksum((y[:1].expand(3, 4),)) == checksum((y[:1].repeat(3, 1),))
