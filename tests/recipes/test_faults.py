"""Kills, signals, disks that fail and damaged checkpoints, from the command line."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlm_mhc.checkpoint.run import _state_checksum
from rlm_mhc.testing.runs import SMALL_RUN, read_losses, read_metrics
from rlm_mhc.train.output import read_config

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def started(corpus, tmp_path, default_signals):
    """A run in a process of its own, that has logged a step."""
    processes = []

    def start(*arguments, output=subprocess.PIPE):
        out = tmp_path / "run"
        command = [sys.executable, str(RECIPES / "pretrain_1b.py"), *SMALL_RUN, f"data.train_path={corpus}"]
        pipes = dict(stdout=output, stderr=output, text=True)
        process = subprocess.Popen([*command, f"output_dir={out}", *arguments], **pipes)
        processes.append(process)
        while process.poll() is None and not ((out / "metrics.jsonl").is_file() and read_metrics(out)):
            time.sleep(0.05)
        return process, out

    yield start
    for process in processes:
        process.kill()


@pytest.mark.slow
def test_fifty_kills_in_short(tmp_path):
    command = [sys.executable, str(RECIPES / "torture.py"), "--kills", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("5 kills, 0 differences\n")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_ends_the_run_with_a_checkpoint_to_go_on_from(started, pretrain, corpus, name):
    process, out = started("training.max_steps=100000")
    process.send_signal(getattr(signal, name))
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"{name}: finishing the step" in errors
    assert "resume=auto" in said.splitlines()[-1]
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert checkpoint.name in said.splitlines()[-1]
    step = json.loads((checkpoint / "trainer_state.json").read_text())["step"]
    assert abs(read_metrics(out)[-1]["step"] - step) <= 1
    more = [f"data.train_path={corpus}", f"output_dir={out}", f"training.max_steps={step + 2}", "resume=auto"]
    result = pretrain(*more)
    assert result.code == 0, result.err
    assert "changed      training.max_steps: 100000 before" in result.out
    assert [r["step"] for r in read_metrics(out)] == list(range(1, step + 3))


def test_sigusr1_saves_and_goes_on_and_two_signals_at_once_are_one_request(started):
    process, out = started("training.max_steps=100000")
    process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 60
    while not list((out / "checkpoints").glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    before = len(read_metrics(out))
    while len(read_metrics(out)) < before + 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None
    assert len(list((out / "checkpoints").glob("checkpoint-*"))) == 1
    process.send_signal(signal.SIGSTOP)  # so that both are there before the step ends
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert errors.count("finishing the step") == 1
    assert (out / "checkpoints" / f"checkpoint-{read_metrics(out)[-1]['step']}").is_dir()


def test_what_cannot_be_said_ends_nothing(started):
    with open("/dev/full", "w") as full:
        process, out = started("training.max_steps=6", "mhc.target_amax=1e-6", output=full)
    process.wait(60)
    assert process.returncode == 0
    assert [r["step"] for r in read_metrics(out)] == [1, 2, 3, 4, 5, 6]
    assert (out / "checkpoints" / "checkpoint-6").is_dir()


def test_interrupted_together_with_the_reader_of_its_output_a_run_saves_all_the_same(started):
    process, out = started("training.max_steps=100000")
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert process.returncode == 0
    assert len(list((out / "checkpoints").glob("checkpoint-*"))) == 1


def test_sigusr1_while_nothing_can_be_saved_yet_is_passed_over(corpus, tmp_path):
    command = [sys.executable, str(RECIPES / "pretrain_1b.py"), *SMALL_RUN, f"data.train_path={corpus}"]
    command += [f"output_dir={tmp_path / 'run'}", "training.max_steps=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        said = process.stdout.readline()  # it is about to read its data
        process.send_signal(signal.SIGUSR1)
        said += process.stdout.read()
    assert process.returncode == 0, said


def test_auto_passes_over_a_damaged_checkpoint_and_comes_out_the_same(pretrain, corpus, tmp_path):
    out = tmp_path / "run"
    arguments = [f"data.train_path={corpus}", f"output_dir={out}", "training.max_steps=6", "training.save_steps=2"]
    assert pretrain(*arguments).code == 0
    expected, newest = read_losses(out), out / "checkpoints" / "checkpoint-6"
    files = {path.name: path.read_bytes() for path in newest.iterdir()}
    weights = bytearray(files["model.safetensors"])
    weights[-5] ^= 4
    (newest / "model.safetensors").write_bytes(weights)
    (out / "checkpoints" / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    result = pretrain(*arguments, "resume=auto")
    assert result.code == 0, result.err
    assert "checkpoint-6/model.safetensors: damaged" in result.out
    assert "checkpoint-4/optimizer.pt: damaged" in result.out
    assert "resumed      " in result.out
    assert "step 2: weights, optimizer, schedule, random generators, place in the data" in result.out
    assert read_losses(out) == expected
    again = {path.name: path.read_bytes() for path in newest.iterdir()}
    changed = {name for name in files if files[name] != again[name]}
    assert changed <= {"config.yaml", "trainer_state.json"}  # resume=auto is in the one, its checksum in the other
    assert (out / "checkpoints" / "checkpoint-6.damaged").is_dir()


def test_another_batch_size_goes_on_where_sequences_line_up(pretrain, corpus, tmp_path):
    out = tmp_path / "run"
    arguments = [f"data.train_path={corpus}", f"output_dir={out}", "resume=auto"]
    assert pretrain(*arguments, "training.max_steps=3").code == 0  # 3 × 2 × 2 sequences
    refused = pretrain(*arguments, "training.max_steps=5", "training.batch_size=4")
    assert refused.code == 2
    assert "consumed 12 sequences" in refused.last_error
    assert "4 as before, or one of 1, 2, 3, 4, 6, 12 sequences per step would work" in refused.last_error
    result = pretrain(*arguments, "training.max_steps=5", "training.batch_size=3")
    assert result.code == 0, result.err
    assert "changed      training.batch_size: 2 before, 3 now" in result.out
    assert [r["step"] for r in read_metrics(out)] == [1, 2, 3, 4, 5]
    assert [r["tokens"] for r in read_metrics(out)] == [64, 128, 192, 288, 384]


def test_a_folder_that_vanishes_is_made_anew_with_all_that_was_logged(started):
    process, out = started("training.max_steps=100000", "training.save_steps=1000000")
    shutil.rmtree(out)
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert [r["step"] for r in read_metrics(out)] == list(range(1, len(read_metrics(out)) + 1))
    assert len(list((out / "checkpoints").iterdir())) == 1


def test_a_disk_that_takes_no_more_does_not_end_the_run_before_its_end(pretrain, corpus, tmp_path, monkeypatch):
    out = tmp_path / "run"
    arguments = [f"data.train_path={corpus}", f"output_dir={out}", "training.save_steps=2"]
    assert pretrain(*arguments, "training.max_steps=2").code == 0
    whole = {path: path.read_bytes() for path in (out / "checkpoints" / "checkpoint-2").iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlm_mhc.checkpoint.run.sync_tree", full)
    result = pretrain(*arguments, "training.max_steps=6", "resume=auto")
    assert result.code == 2
    said = result.out + result.err
    assert said.count("No space left on device; the training goes on") == 2
    assert "the training is done, but its last checkpoint could not be written" in result.last_error
    assert [r["step"] for r in read_metrics(out)] == [1, 2, 3, 4, 5, 6]
    assert {path: path.read_bytes() for path in whole} == whole
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_no_checkpoint_is_newer_than_what_is_logged(pretrain, corpus, tmp_path, monkeypatch):
    out, whole = tmp_path / "run", Path.open

    def opened(path, mode="r", *arguments, **options):
        if path.name == "metrics.jsonl" and mode == "ab":
            raise OSError(28, "No space left on device")
        return whole(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)
    assert pretrain(f"data.train_path={corpus}", f"output_dir={out}", "training.max_steps=1").code == 0
    assert [r["step"] for r in read_metrics(out)] == [1]


def test_a_state_of_another_form_is_refused_by_name_even_where_its_checksum_fits(pretrain, corpus, tmp_path):
    out = tmp_path / "run"
    arguments = [f"data.train_path={corpus}", f"output_dir={out}"]
    assert pretrain(*arguments, "training.max_steps=1").code == 0
    file = out / "checkpoints" / "checkpoint-1" / "trainer_state.json"
    state = json.loads(file.read_text())
    del state["xxh3_128"]
    place = {"seed": 42, "epoch": 0, "offset": None}
    wrong = [("position", None), ("position", place), ("windows", "9"), ("tokens", []), ("watch", {"losses": [1]})]
    for name, value in wrong:
        changed = state | {name: value}
        file.write_text(json.dumps(changed | {"xxh3_128": _state_checksum(changed)}))
        result = pretrain(*arguments, "training.max_steps=2", "resume=auto")
        assert result.code == 2
        assert f"{file}: '{name}' is" in result.last_error


def test_moved_and_touched_data_are_gone_on_with_also_by_an_old_checkpoint(pretrain, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("rlm_mhc.train.plan.peak_rate", lambda *_: (1e9, "assumed"))
    monkeypatch.setattr("rlm_mhc.train.loop.draw_curves", lambda records, file, title: file.touch())
    out, moved = tmp_path / "run", tmp_path / "moved"
    held_out = tmp_path / "held_out.jsonl"
    shutil.copy(corpus, held_out)
    common = [f"output_dir={out}", "resume=auto"]
    assert (
        pretrain(*common, f"data.train_path={corpus}", f"data.eval_path={held_out}", "training.max_steps=1").code == 0
    )
    moved.mkdir()
    for file in (corpus, held_out):
        shutil.move(file, moved)
    arguments = [*common, f"data.train_path={moved / 'corpus.jsonl'}", f"data.eval_path={moved / held_out.name}"]
    result = pretrain(*arguments, "training.max_steps=2")
    assert result.code == 0, result.err
    assert "step 1: weights, optimizer, schedule, random generators, place in the data" in result.out
    assert "reused from" in result.out
    # As a version before wrote it, which knew data by path, size and time.
    run = read_config(out / "config.yaml")
    former = run.data.reader()(run.token_folder, str(out / "checkpoints" / "checkpoint-2"), 300).former
    file = out / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text()) | {"data": former}
    del state["xxh3_128"]
    file.write_text(json.dumps(state | {"xxh3_128": _state_checksum(state)}))
    result = pretrain(*arguments, "training.max_steps=3")
    assert "step 2: weights, optimizer, schedule, random generators, place in the data" in result.out
    assert [r["step"] for r in read_metrics(out)] == [1, 2, 3]
    with (moved / held_out.name).open("a") as more:
        more.write('{"text": "other"}\n')
    assert "trained on other data" in pretrain(*arguments, "training.max_steps=4").last_error
