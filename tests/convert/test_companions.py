"""What belongs to a model beside its weights and config comes along, there and back."""

import json

import pytest
from transformers import AutoModelForCausalLM
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from rlm_mhc.convert import to_llama, upcycle
from rlm_mhc.model import RLMModel

LICENCE = ("LICENSE", "LICENSE.txt", "license.md", "Licence", "COPYING", "NOTICE", "USE_POLICY.md")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja")
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "tokenization_own.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "source.spm",
    "qwen.tiktoken",
)
OTHERS = ("README.md", "notes.txt", "modeling_own.py", "training_args.bin", "trainer_state.json", "optimizer.pt")


def write(folder, names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"content of {name}")


def files(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def folder(theirs, tmp_path):
    theirs(eos_token_id=[2, 7]).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_tokenizer_templates_and_licence_come_there_and_back(folder, tmp_path):
    carried = {*TOKENIZERS, *TEMPLATES, *LICENCE}
    write(folder, [*carried, *OTHERS])
    upcycle(folder, tmp_path / "ours")
    to_llama(tmp_path / "ours", tmp_path / "back")
    for place in (tmp_path / "ours", tmp_path / "back"):
        assert carried <= files(place)
        assert not files(place) & set(OTHERS)
        assert all((place / name).read_text() == f"content of {name}" for name in carried)


def test_the_files_of_every_tokenizer_of_transformers_come_along(folder, tmp_path):
    names = {name for name in TOKENIZER_MAPPING_NAMES.values() if isinstance(name, str)}
    vocabularies = {file for name in names for file in _vocabulary_of(name)}
    assert len(vocabularies) > 10
    write(folder, vocabularies)
    upcycle(folder, tmp_path / "ours")
    assert vocabularies <= files(tmp_path / "ours")


def _vocabulary_of(name):
    try:
        return tokenizer_class_from_name(name).vocab_files_names.values()
    except (ImportError, AttributeError):  # a tokenizer of a package that is not installed
        return ()


@pytest.mark.parametrize("form", ["module", "folder", "folder without generation_config.json"])
def test_every_end_of_text_and_the_sampling_come_along(folder, tmp_path, form):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    model.generation_config.save_pretrained(folder)
    if form.endswith("json"):  # as old versions of transformers wrote it
        (folder / "generation_config.json").unlink()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | dict(do_sample=True, temperature=0.6, top_p=0.9)))
    upcycle(model if form == "module" else folder, tmp_path / "ours")
    to_llama(tmp_path / "ours", tmp_path / "back")
    for loaded in (
        RLMModel.from_pretrained(tmp_path / "ours"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "back"),
    ):
        generation = loaded.generation_config
        assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == ([2, 7], 0, 1)
        assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.6, 0.9)
        assert loaded.config.eos_token_id == [2, 7]


def test_a_folder_of_links_as_the_hub_caches_it_is_copied(folder, tmp_path):
    (tmp_path / "blob").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "blob")
    upcycle(folder, tmp_path / "ours")
    assert not (tmp_path / "ours" / "tokenizer.json").is_symlink()
    assert (tmp_path / "ours" / "tokenizer.json").read_text() == "{}"
