import pytest
import torch

from rlm_mhc.data import Source, train_tokenizer
from rlm_mhc.model import RLMModel
from rlm_mhc.testing import small_config
from rlm_mhc.testing.models import perturbed
from rlm_mhc.tree import tree_map

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def make_model():
    """A small model whose mHC weights are off their symmetric start."""

    def make(**changes):
        model = RLMModel(small_config(**changes)).eval()
        with torch.no_grad():
            tree_map(torch.Tensor.copy_, model.tree(), perturbed(model.tree()))
        return model

    return make


@pytest.fixture
def tokenizer():
    source = Source("words", "words", lambda bad: iter(["stream matrix row column"] * 50))
    trained = train_tokenizer(source, 300)
    trained.chat_template = TEMPLATE
    return trained


@pytest.fixture
def checkpoint(make_model, tokenizer, tmp_path):
    """A folder with a model and its tokenizer."""
    model = make_model(vocab_size=300)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tokens():
    return torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
