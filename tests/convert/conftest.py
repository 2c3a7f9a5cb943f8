import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlm_mhc.testing import assert_as_accurate


@pytest.fixture
def theirs():
    """A small model of transformers with random weights, by architecture; grouped heads, weights so large that every
    part of it shows in the logits."""

    def build(kind="llama", **changes):
        fields = dict(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=96,
            vocab_size=101,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            rms_norm_eps=1e-5,
            initializer_range=0.1,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        if kind == "mistral":
            fields["sliding_window"] = None
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(fields | changes))).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 1:  # norms of ones and biases of zeros would hide that they are not read
                    weight.add_(0.2 * torch.randn(weight.shape))
                assert weight.std() > 0, name
        return model

    return build


@pytest.fixture
def same_logits():
    """Check logits of ours against those of a model of theirs, of which one in float64 is the exact one."""

    def check(actual, model, tokens):
        with torch.no_grad():
            plain, exact = (m(tokens).logits for m in (model, copy.deepcopy(model).double()))
        assert_as_accurate(actual, plain, exact)

    return check
