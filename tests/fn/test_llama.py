"""With alpha = 0 the network is the plain pre-norm transformer: against transformers' Llama, which is not our code."""

import pytest
import torch

from rlm_mhc import fn
from rlm_mhc.testing import assert_as_accurate, random_batch, small_config
from rlm_mhc.testing.baselines import llama
from rlm_mhc.tree import map_named, named_leaves


def llama_with(config, params):
    """Their model with our weights."""
    theirs = llama(config).eval()
    weights = {
        name if name.startswith("lm_head") else f"model.{name}": leaf
        for name, leaf in named_leaves(params).items()
        if "mhc" not in name
    }
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return theirs


def logits_of(theirs, tokens):
    """In float32 and, but for norms and angles, in float64."""
    with torch.no_grad():
        return theirs(tokens).logits, theirs.double()(tokens).logits


def perturbed(params):
    """Weights so large that every part of the network shows in the logits."""
    return map_named(
        lambda name, w: w * (5 if "proj" in name else 25) if w.dim() == 2 and "mhc" not in name else w, params
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mhc", [True, False])
def test_logits_equal_llamas(tied, mhc):
    config = small_config(tie_embeddings=tied, mhc_enabled=mhc, rope_theta=500.0)
    params = perturbed(fn.init(config))
    params = map_named(lambda name, w: w * 0 if name.endswith("alpha") else w, params)
    tokens = random_batch(config, 3, 17).tokens
    plain, exact = logits_of(llama_with(config, params), tokens)
    assert exact.std() > 0.5
    assert_as_accurate(fn.forward(params, tokens, config), plain, exact)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_logits_equal_llamas_at_initial_weights(n):
    """Where embeddings are so small that a norm's eps shows: the aggregate must not scale its input."""
    config = small_config(mhc_flows=n)
    params = map_named(lambda name, w: w * 0 if name.endswith("alpha") else w, fn.init(config))
    tokens = random_batch(config, 3, 17).tokens
    plain, exact = logits_of(llama_with(config, params), tokens)
    assert exact.std() > 0.05
    assert_as_accurate(fn.forward(params, tokens, config), plain, exact)


def test_gradients_equal_llamas():
    config = small_config(mhc_enabled=False, tie_embeddings=False)
    params, batch = perturbed(fn.init(config)), random_batch(config, 2, 9)

    def gradients(theirs):
        logits = theirs(batch.tokens).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
        return {name.removeprefix("model."): w.grad for name, w in theirs.named_parameters()}

    plain, exact = (gradients(model) for model in (llama_with(config, params), llama_with(config, params).double()))
    assert_as_accurate(named_leaves(torch.func.grad(fn.loss)(params, batch, config)), plain, exact)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_generation_equals_llamas(penalty):
    config = small_config(mhc_enabled=False)
    params, tokens = perturbed(fn.init(config)), random_batch(config, 3, 7).tokens
    theirs = llama_with(config, params)
    stop = fn.generate(params, tokens, config, max_new_tokens=12, repetition_penalty=penalty).tokens[1, 10].item()
    how = dict(do_sample=False, use_cache=True, eos_token_id=stop, pad_token_id=0, repetition_penalty=penalty)
    expected = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, **how)
    ours = fn.generate(params, tokens, config, max_new_tokens=12, stop_tokens=[stop], repetition_penalty=penalty)
    assert torch.equal(ours.tokens[:, : expected.shape[1]], expected)
    assert ours.lengths[1] <= 11
