import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rlm_mhc import fn
from rlm_mhc.testing import random_batch
from rlm_mhc.testing.strategies import configs
from rlm_mhc.tree import map_named, named_leaves, tree_map
from rlm_mhc.variants import PRESETS

seeds = st.integers(0, 2**32)


def lively(config, seed, dtype=torch.float64):
    """Parameters far from their initial values, so that nothing is nearly zero or nearly equal."""
    generator = torch.Generator().manual_seed(seed)
    params = fn.init(config, dtype=dtype)
    return tree_map(lambda w: w + 0.3 * torch.randn(w.shape, generator=generator, dtype=dtype), params)


@given(configs(), st.integers(2, 10), st.data())
def test_no_token_sees_what_comes_after_it(config, length, data):
    params, changed = lively(config, 0), data.draw(st.integers(1, length - 1))
    tokens = random_batch(config, 2, length).tokens
    other = tokens.clone()
    other[:, changed:] = (other[:, changed:] + 1) % config.vocab_size
    a, b = fn.forward(params, tokens, config), fn.forward(params, other, config)
    assert torch.allclose(a[:, :changed], b[:, :changed], atol=1e-12, rtol=0)
    assert not torch.allclose(a[:, changed], b[:, changed], atol=1e-6)


@given(configs(), st.integers(1, 8), seeds)
def test_a_sequence_does_not_see_its_batch(config, length, seed):
    params, tokens = lively(config, seed), random_batch(config, 3, length, seed=seed).tokens
    together = fn.forward(params, tokens, config)
    alone = torch.cat([fn.forward(params, tokens[i : i + 1], config) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-11, rtol=0)
    assert torch.allclose(together[0], fn.forward(params, tokens[0], config), atol=1e-11, rtol=0)


@given(
    configs(
        mhc_enabled=True, mhc_preset="paper", mhc_projection=None, mhc_flows=4, num_layers=3, mhc_sinkhorn_iters=20
    ),
    seeds,
)
def test_every_mhc_weight_receives_a_gradient_at_init(config, seed):
    params, batch = fn.init(config, seed=seed), random_batch(config, 2, 8, seed=seed)
    grads = torch.func.grad(fn.loss)(params, batch, config)
    n = config.mhc_flows
    # The last sub-layer's res has no gradient: its columns sum to 1 and the head averages the streams.
    for layer in grads.layers[:-1]:
        for site in (layer.attn_mhc, layer.mlp_mhc):
            assert (site.alpha != 0).all()
            for part in site.bias.split([n, n, n * n]):
                assert part.any()
            for part in site.phi.split([n, n, n * n], dim=-1):
                assert part.any()
    assert all(g.isfinite().all() for g in named_leaves(grads).values())


@given(configs(mhc_enabled=True).filter(lambda config: config.mhc_flows > 1), seeds)
def test_with_alpha_at_zero_mhc_is_the_plain_transformer(config, seed):
    params = fn.init(config, seed=seed, dtype=torch.float64)
    params = map_named(lambda name, w: w * 0 if name.endswith("alpha") else w, params)
    plain = config.replace(mhc_enabled=False)
    layers = tuple(layer._replace(attn_mhc=(), mlp_mhc=()) for layer in params.layers)
    tokens = random_batch(config, 2, 7, seed=seed).tokens
    expected = fn.forward(params._replace(layers=layers, head_mhc=()), tokens, plain)
    # The eps of DeepSeek-V4 scales the aggregate a little, and takes a little from every row.
    tolerance = 1e-4 if PRESETS[config.mhc_preset].eps else 1e-12
    assert torch.allclose(fn.forward(params, tokens, config), expected, atol=tolerance, rtol=0)


@given(configs(), seeds)
def test_gradient_equals_the_central_difference(config, seed):
    params, batch = lively(config, seed), random_batch(config, 2, 5, seed=seed, ignored=0.2)
    assume((batch.targets >= 0).any())
    direction = lively(config, seed + 1)
    step = 1e-5
    up, down = (
        fn.loss(tree_map(lambda w, d, s=sign: w + s * step * d, params, direction), batch, config) for sign in (1, -1)
    )
    grads = torch.func.grad(fn.loss)(params, batch, config)
    slope = sum(
        (g * d).sum() for g, d in zip(*map(lambda t: named_leaves(t).values(), (grads, direction)), strict=True)
    )
    assert torch.allclose(slope, (up - down) / (2 * step), rtol=1e-4, atol=1e-6)
