"""Weights & Biases without a network: what is refused, which login counts, and which run is continued."""

import sys
from types import SimpleNamespace

import pytest

from rlm_mhc.config import WandbConfig
from rlm_mhc.train.wandb_run import ID_FILE, finished, report_to, require_wandb, start_wandb

KEY = "0123456789" * 4
RECORD = {"step": 1, "train/loss": 8.1}


def test_wandb_is_not_touched_without_a_project(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    require_wandb(WandbConfig())
    assert start_wandb(WandbConfig(), tmp_path, {}) is None
    with pytest.raises(ValueError, match="pip install wandb"):
        require_wandb(WandbConfig(project="p"))


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """wandb as on a machine without a login, that asks nothing and starts nothing; `inits` are the runs."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # what an earlier test found
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    inits = []

    def init(**options):
        inits.append(options)
        return SimpleNamespace(id=options["id"] or f"run{len(inits)}")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "inits", inits, raising=False)
    yield wandb
    wandb.teardown()


@pytest.mark.parametrize("name", ["my/proj", "a#b", "a?b", "50%", "a:b", "a\\b", "a" * 129])
def test_a_project_that_wandb_refuses_is_refused_before_anything_is_spent(wandb, name):
    with pytest.raises(ValueError, match=r"wandb refuses it: .*Invalid project name"):
        require_wandb(WandbConfig(project=name))


def test_so_are_an_unknown_mode_and_a_key_that_is_none(wandb, monkeypatch):
    require_wandb(WandbConfig(project="p"))
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(ValueError, match=r"wandb refuses it: .*mode"):
        require_wandb(WandbConfig(project="p"))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(ValueError, match="wandb refuses it: WANDB_API_KEY invalid"):
        require_wandb(WandbConfig(project="p"))


def of_netrc(folder, host):
    (folder / "netrc").write_text(f"machine {host} login user password {KEY}\n")
    (folder / "netrc").chmod(0o600)


@pytest.mark.parametrize(
    ("variables", "host", "mode"),
    [
        ({}, None, "offline"),
        ({"WANDB_API_KEY": KEY}, None, "online"),
        ({}, "api.wandb.ai", "online"),
        ({}, "wandb.example.org", "offline"),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, "wandb.example.org", "online"),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, "api.wandb.ai", "offline"),
        ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, None, "online"),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, None, "offline"),
        ({"WANDB_MODE": "disabled"}, None, "disabled"),
    ],
)
def test_the_login_is_what_wandb_finds(wandb, tmp_path, monkeypatch, capfd, variables, host, mode):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if host:
        of_netrc(tmp_path, host)
    start_wandb(WandbConfig(project="p"), tmp_path, {})
    assert [options["mode"] for options in wandb.inits] == [mode]
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("wandb ")]
    assert len(said) == (mode == "offline" and "WANDB_MODE" not in variables)
    assert all("no login found; logging offline" in line for line in said)


def test_resume_continues_the_run_of_the_folder_and_nothing_else_does(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    config = WandbConfig(project="p")
    for resume in (True, True, False, True):
        start_wandb(config, tmp_path, {}, resume=resume)
    chosen = [(options["id"], options["resume"]) for options in wandb.inits]
    assert chosen == [(None, None), ("run1", "allow"), (None, None), ("run3", "allow")]
    (tmp_path / ID_FILE).write_text("no id/\n")
    start_wandb(config, tmp_path, {}, resume=True)
    assert wandb.inits[-1]["id"] is None


def test_a_server_that_does_not_answer_leaves_the_run_offline(wandb, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    recorded = wandb.init

    def unreachable(**options):
        if options["mode"] == "online":
            raise wandb.errors.CommError("Run initialization has timed out\nmore")
        return recorded(**options)

    monkeypatch.setattr(wandb, "init", unreachable)
    assert start_wandb(WandbConfig(project="p"), tmp_path, {}).id == "run1"
    assert "Run initialization has timed out; logging offline" in capfd.readouterr().out


@pytest.mark.slow
def test_without_a_login_a_run_is_logged_offline_and_continued_under_its_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb").teardown()
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    for resume in (False, True):
        run = start_wandb(WandbConfig(project="p"), tmp_path, {"a": 1}, resume=resume)
        report_to(run)(RECORD)
        report_to(None)(RECORD)
        run.finish()
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert {folder.name.rpartition("-")[2] for folder in folders} == {(tmp_path / ID_FILE).read_text().strip()}


def test_a_run_is_finished_as_failed_where_the_training_fails():
    codes = []
    run = SimpleNamespace(finish=lambda exit_code=None: codes.append(exit_code))
    with finished(run):
        pass
    with pytest.raises(KeyboardInterrupt), finished(run):
        raise KeyboardInterrupt
    with finished(None):
        pass
    assert codes == [None, 1]


def test_the_death_of_wandbs_process_ends_no_training(capsys):
    calls = []

    def broken(*args, **options):
        calls.append(args)
        raise ConnectionResetError("Connection lost")

    run = SimpleNamespace(log=broken, finish=broken)
    report = report_to(run)
    with finished(run):
        report(RECORD)
        report(RECORD)
    assert len(calls) == 2  # one record, and the end
    assert "ConnectionResetError: Connection lost" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt), finished(run):
        raise KeyboardInterrupt
