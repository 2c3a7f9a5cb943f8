import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain

import numpy as np
import pytest

from rlm_mhc.data import Source, jsonl_source, load_tokenizer, prepare, reuse, save_tokenizer, train_tokenizer
from rlm_mhc.data.reuse import described
from rlm_mhc.data.tokenizer import id_bound, tokenizer_fingerprint
from rlm_mhc.testing.tokenizers import llama_tokenizer, tokenizer_with_gaps

WORDS = ["stream", "matrix", "row", "column", "gain", "token", "layer", "head"]


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(1, 30))) for _ in range(count)]


def source(documents, fingerprint="a"):
    return Source("test", fingerprint, lambda bad: iter(documents))


def run(folder, documents, **options):
    defaults = dict(tokenizer="auto", vocab_size=300, max_length=16, say=lambda line: None)
    eval_source = options.pop("eval_source", None)
    given = documents if isinstance(documents, Source) else source(documents)
    return prepare(folder, given, eval_source, **(defaults | options))


def inputs_and_last_target(windows):
    """The stream that the windows were cut from."""
    rows = [windows.inputs_and_targets(i) for i in range(windows.total)]
    targets = np.concatenate([t[t != -100] for _, t in rows])
    return np.concatenate([rows[0][0][:1], targets])


def test_token_files_are_the_same_for_any_number_of_tokenizing_threads(tmp_path, monkeypatch):
    written = []
    for parallel in ("true", "false"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        folder = tmp_path / parallel
        run(folder, texts(300))
        written.append(
            {file: (folder / file).read_bytes() for file in ("train.bin", "eval.bin", "tokenizer/tokenizer.json")}
        )
    assert written[0] == written[1]


def test_no_token_is_lost_and_documents_come_back(tmp_path):
    documents = texts(50)
    data = run(tmp_path, documents, eval_source=source(texts(3, seed=1), "b"))
    stream = inputs_and_last_target(data.train)
    decoded = data.tokenizer.decode(stream.tolist()).split("<|endoftext|>")
    assert decoded == [*documents, ""]


def test_documents_begin_as_the_tokenizer_begins_texts(tmp_path):
    documents = texts(5)
    tokenizer = llama_tokenizer(documents)
    tokenizer.save_pretrained(tmp_path / "llama")
    data = run(tmp_path / "tokens", documents, tokenizer=str(tmp_path / "llama"), vocab_size=len(tokenizer))
    written = np.fromfile(tmp_path / "tokens" / "train.bin", dtype=np.uint16).tolist()
    assert written == [id for text in documents for id in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert written.count(tokenizer.bos_token_id) == len(documents)
    with pytest.raises(ValueError, match="no text to train on"):
        run(tmp_path / "none", ["", ""], tokenizer=str(tmp_path / "llama"), vocab_size=len(tokenizer))
    tokenizer.bos_token = None
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(data.tokenizer)


def test_documents_of_our_tokenizers_have_no_beginning(tmp_path):
    data = run(tmp_path, ["row column", "gain"])
    expected = [[*data.tokenizer(text)["input_ids"], data.tokenizer.eos_token_id] for text in ("row column", "gain")]
    assert np.fromfile(tmp_path / "train.bin", dtype=np.uint16).tolist() == list(chain(*expected))


def test_every_hundredth_document_is_held_out(tmp_path):
    documents = texts(250)
    data = run(tmp_path, documents)
    held_out = data.tokenizer.decode(inputs_and_last_target(data.evaluation).tolist()).split("<|endoftext|>")
    assert held_out == [documents[99], documents[199], ""]


def test_few_documents_hold_out_the_last_windows(tmp_path):
    data = run(tmp_path, texts(10))
    assert data.evaluation.total == 1
    assert data.evaluation.first == data.train.total
    one = run(tmp_path / "one", ["row column"])
    assert (one.train.total, one.evaluation.total) == (1, 0)


def test_reused_while_data_and_tokenizer_are_unchanged(tmp_path):
    said = []
    run(tmp_path, texts(20), say=said.append)
    before = (tmp_path / "train.bin").stat().st_mtime_ns
    run(tmp_path, texts(20), say=said.append)
    assert (tmp_path / "train.bin").stat().st_mtime_ns == before
    assert "reused" in said[-1]
    run(tmp_path, texts(20), vocab_size=290, say=said.append)
    assert (tmp_path / "train.bin").stat().st_mtime_ns != before
    before = (tmp_path / "train.bin").stat().st_mtime_ns
    run(tmp_path, source(texts(20, seed=2), "c"), say=said.append)
    assert (tmp_path / "train.bin").stat().st_mtime_ns != before


def test_an_interrupted_preparation_is_not_reused(tmp_path):
    run(tmp_path, texts(20))
    (tmp_path / "meta.json").unlink()
    (tmp_path / "train.bin").write_bytes(b"half")
    assert run(tmp_path, texts(20)).train.total > 1


def test_two_runs_at_once_in_a_folder_train_on_their_own_tokens_and_leave_those_of_one(tmp_path):
    trained = train_tokenizer(source(texts(20)), 290)
    trained.save_pretrained(tmp_path / "tokenizer")
    reading = threading.Barrier(2)

    def read(documents):
        yield documents[0]
        with suppress(threading.BrokenBarrierError):
            reading.wait(1)  # where nothing keeps them apart, both are in the middle of it
        yield from documents[1:]

    def prepared(seed):
        own = Source("test", str(seed), lambda bad: read(texts(250, seed)))
        return run(tmp_path / "tokens", own, tokenizer=str(tmp_path / "tokenizer"))

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(prepared, (1, 2)))
    for seed, data in enumerate(found, start=1):
        decoded = trained.decode(inputs_and_last_target(data.train).tolist()).split("<|endoftext|>")
        assert decoded[:-1] == [text for i, text in enumerate(texts(250, seed)) if i % 100 != 99]
    meta = json.loads((tmp_path / "tokens" / "meta.json").read_text())
    assert meta["files"] == {name: described(tmp_path / "tokens" / name) for name in ("train.bin", "eval.bin")}


def test_tokens_that_are_not_those_written_are_made_anew(tmp_path):
    run(tmp_path, texts(20))
    whole = (tmp_path / "train.bin").read_bytes()
    (tmp_path / "train.bin").write_bytes(whole[::-1])
    run(tmp_path, texts(20))
    assert (tmp_path / "train.bin").read_bytes() == whole


def test_a_disk_that_is_full_is_left_as_it_was(tmp_path):
    def read(bad):
        yield from texts(20)
        raise OSError(28, "No space left on device")

    run(tmp_path, texts(20))
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match="No space"):
        run(tmp_path, Source("test", "b", read), tokenizer=str(tmp_path / "tokenizer"))
    assert {path.name for path in tmp_path.iterdir()} == before - {"meta.json"}


def test_what_a_killed_run_was_making_is_removed(tmp_path):
    (tmp_path / ".making-x").mkdir()
    (tmp_path / ".making-x" / "train.bin").write_bytes(b"half")
    run(tmp_path, texts(20))
    assert not (tmp_path / ".making-x").exists()


def test_a_checksum_is_of_all_of_a_small_file_and_of_both_ends_of_a_large_one(tmp_path, monkeypatch):
    monkeypatch.setattr(reuse, "SAMPLES", 4)
    monkeypatch.setattr(reuse, "SAMPLE_BYTES", 8)
    file = tmp_path / "file"
    for size, changed in ((0, []), (32, range(32)), (99, [0, 7, 30, 37, 90, 97])):
        found = []
        for place in [None, *changed]:
            file.write_bytes(bytes(place == i for i in range(size)))
            found.append(tuple(described(file).items()))
        assert len(set(found)) == 1 + len(changed)


def test_bad_data_leaves_nothing_to_be_reused(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(30)) + "nonsense\n")
    with pytest.raises(ValueError, match="line 31"):
        run(tmp_path / "out", jsonl_source(str(file)))
    assert not (tmp_path / "out" / "meta.json").exists()


def test_byte_level_tokenizer_returns_any_text(tmp_path):
    tokenizer = train_tokenizer(source(texts(20)), 280)
    for text in ["plain", "  spaces\t\n", "汉字 😀 \x00", "a <|endoftext|> b"]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer(source(texts(2)), 256)


def test_a_document_that_spells_end_of_text_is_text(tmp_path):
    data = run(tmp_path, ["row <|endoftext|> column"])
    stream = inputs_and_last_target(data.train)
    assert (stream == data.tokenizer.eos_token_id).sum() == 1


def test_tokenizers_from_a_folder(tmp_path):
    trained = train_tokenizer(source(texts(20)), 280)
    trained.save_pretrained(tmp_path / "tokenizer")
    data = run(tmp_path / "out", texts(20), tokenizer=str(tmp_path / "tokenizer"))
    assert data.tokenizer.get_vocab() == trained.get_vocab()
    with pytest.raises(ValueError, match=rf"model\.vocab_size={len(trained)}"):
        load_tokenizer(str(tmp_path / "tokenizer"), 200)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"), 300)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no tokenizer files"):
        load_tokenizer(str(tmp_path / "empty"), 300)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{broken")
    with pytest.raises(FileNotFoundError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path / "tokenizer"), 300)


def test_a_tokenizer_that_a_full_disk_does_not_take_is_an_os_error(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"the tokenizer cannot be written \(No space left on device"):
        save_tokenizer(train_tokenizer(source(texts(20)), 280), tmp_path)


def test_bad_lines_are_counted_once_and_also_of_reused_files(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(199)) + "nonsense\n")

    def prepared(**options):
        said = []
        data = run(tmp_path / "tokens", jsonl_source(str(file)), say=said.append, **options)
        return data, [line for line in said if line.startswith("bad")]

    data, said = prepared()
    assert data.bad_fraction == 1 / 200
    assert said == [f"bad line     {file}, line 200: {said[0].split(': ', 1)[1]}", "bad lines    1 of 200 skipped"]
    again, said = prepared()
    assert again.bad_fraction == 1 / 200
    assert said == ["bad lines    1 of 200 skipped"]
    assert again.fingerprint == data.fingerprint
    with pytest.raises(ValueError, match="line 200"):
        prepared(strict=True)
    with pytest.raises(ValueError, match=r"max_bad_fraction=0\.001"):
        prepared(max_bad_fraction=0.001)


@pytest.mark.parametrize("end_of_text", [299, 70000])
def test_ids_with_gaps_are_those_of_the_tokenizer(tmp_path, end_of_text):
    tokenizer = tokenizer_with_gaps(train_tokenizer(source(texts(20)), 280), end_of_text)
    assert (len(tokenizer), id_bound(tokenizer)) == (280, end_of_text + 1)
    tokenizer.save_pretrained(tmp_path / "gaps")
    name, documents = str(tmp_path / "gaps"), texts(3)
    with pytest.raises(
        ValueError, match=rf"ids up to {end_of_text}, more than model\.vocab_size=290 .*={end_of_text + 1},"
    ):
        run(tmp_path / "tokens", documents, tokenizer=name, vocab_size=290)
    data = run(tmp_path / "tokens", documents, tokenizer=name, vocab_size=end_of_text + 1)
    expected = [id for text in documents for id in [*tokenizer(text)["input_ids"], end_of_text]]
    stream = np.concatenate([inputs_and_last_target(data.train), inputs_and_last_target(data.evaluation)[1:]])
    assert stream.tolist() == expected
    assert data.tokenizer.decode(expected).split("<|endoftext|>") == [*documents, ""]


def test_empty_files_are_told_of_also_of_reused_tokens(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").touch()
    (data / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(9)))
    for eval_source in (None, jsonl_source(str(data))):
        for _ in range(2):
            said = []
            run(tmp_path / "tokens", jsonl_source(str(data)), eval_source=eval_source, say=said.append)
            assert f"empty files  {2 if eval_source else 1} skipped" in said
    assert "reused" in said[-1]
    with pytest.raises(ValueError, match=r"a\.jsonl: the file is empty"):
        run(tmp_path / "tokens", jsonl_source(str(data)), strict=True)
