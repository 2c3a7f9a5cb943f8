import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rlm_mhc import ModelConfig, fn
from rlm_mhc.testing import random_batch
from rlm_mhc.testing.strategies import configs
from rlm_mhc.tree import map_named, named_leaves, tree_leaves, tree_map
from rlm_mhc.variants import PRESETS, PROJECTIONS

seeds = st.integers(0, 2**32)


def perturbed_params(config, seed, dtype=torch.float64):
    """Parameters far from their initial values, so that nothing is nearly zero or nearly equal."""
    generator = torch.Generator().manual_seed(seed)
    params = fn.init(config, dtype=dtype)
    return tree_map(lambda w: w + 0.3 * torch.randn(w.shape, generator=generator, dtype=dtype), params)


def inner(a, b):
    """The sum of all products of two trees' numbers."""
    return sum((x * y).sum() for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


def parts(site, config, res=True):
    """Weights of one sub-layer's mHC by what they make: pre, post and, where it has raw numbers, res."""
    n, raw = config.mhc_flows, PROJECTIONS[config.projection].raw_size(config.mhc_flows)
    split = zip(site.alpha, site.bias.split([n, n, raw]), site.phi.split([n, n, raw], -1), strict=True)
    return [weight for part in list(split)[: 3 if res and raw else 2] for weight in part]


@given(configs(), st.integers(2, 10), st.data())
def test_no_token_sees_what_comes_after_it(config, length, data):
    params, changed = perturbed_params(config, 0), data.draw(st.integers(1, length - 1))
    tokens = random_batch(config, 2, length).tokens
    other = tokens.clone()
    other[:, changed:] = (other[:, changed:] + 1) % config.vocab_size
    a, b = fn.forward(params, tokens, config), fn.forward(params, other, config)
    assert torch.allclose(a[:, :changed], b[:, :changed], atol=1e-12, rtol=0)
    assert not torch.allclose(a[:, changed], b[:, changed], atol=1e-6)


@given(configs(), st.integers(1, 8), seeds)
def test_a_sequence_does_not_see_its_batch(config, length, seed):
    params, tokens = perturbed_params(config, seed), random_batch(config, 3, length, seed=seed).tokens
    together = fn.forward(params, tokens, config)
    alone = torch.cat([fn.forward(params, tokens[i : i + 1], config) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-11, rtol=0)
    assert torch.allclose(together[0], fn.forward(params, tokens[0], config), atol=1e-11, rtol=0)


@given(configs(), st.lists(st.integers(1, 6), min_size=1, max_size=3), st.booleans(), seeds)
def test_decoding_rows_of_any_length_is_the_full_forward(config, lengths, donate, seed):
    params, b, longest = perturbed_params(config, seed), len(lengths), max(lengths)
    tokens, rows, at = random_batch(config, b, longest + 3, seed=seed).tokens, torch.arange(b), torch.tensor(lengths)
    full, cache = fn.forward(params, tokens, config), fn.init_cache(config, b, longest + 3, dtype=torch.float64)
    logits, cache = fn.prefill(params, tokens[:, :longest], config, cache, lengths=at, donate=donate)
    for _ in range(3):
        assert torch.allclose(logits, full[rows, at - 1], atol=1e-11, rtol=0)
        logits, cache = fn.decode_step(params, tokens[rows, at], config, cache, donate=donate)
        at = at + 1
    assert torch.allclose(logits, full[rows, at - 1], atol=1e-11, rtol=0)


@given(configs(mhc_enabled=True, num_layers=3).filter(lambda config: config.mhc_flows > 1), seeds)
def test_every_mhc_weight_of_the_network_receives_a_gradient_at_init(config, seed):
    params, batch = fn.init(config, seed=seed, dtype=torch.float64), random_batch(config, 2, 8, seed=seed)
    grads = torch.func.grad(fn.loss)(params, batch, config)
    *sites, last = [site for layer in grads.layers for site in (layer.attn_mhc, layer.mlp_mhc)]
    # The first res mixes equal streams, the last one streams that are averaged: neither changes anything.
    for site in sites[1:]:
        assert all(part.any() for part in parts(site, config))
    for site in (sites[0], last):
        assert all(part.any() for part in parts(site, config, res=False))
    assert all(weight.any() for weight in grads.head_mhc)
    assert all(g.isfinite().all() for g in named_leaves(grads).values())


@given(configs(mhc_enabled=True, mhc_sinkhorn_iters=20).filter(lambda config: config.mhc_flows > 1), seeds)
def test_no_mhc_weight_of_a_sub_layer_starts_where_gradients_vanish(config, seed):
    params = fn.init(config, seed=seed, dtype=torch.float64).layers[0].attn_mhc
    generator = torch.Generator().manual_seed(seed)
    x, cotangent = torch.randn(2, 50, config.mhc_flows, config.hidden_dim, generator=generator, dtype=torch.float64)
    hidden = fn.Hidden(x, x[..., 0] if PRESETS[config.mhc_preset].early_pre else ())

    def weighted(params):
        (out, pre), _, _ = fn.hyper_connection(params, hidden, torch.sin, config)
        return (cotangent * (out if pre == () else out + pre.unsqueeze(-1))).sum()

    # An alpha is one number, whose gradient may be small by chance.
    assert all(
        part.abs().max() > (1e-6 if part.dim() else 0.0) for part in parts(torch.func.grad(weighted)(params), config)
    )


@given(st.sampled_from([name for name in PRESETS if PRESETS[name].gates == "sigmoid"]), st.integers(1, 6), seeds)
def test_one_stream_is_a_residual_whose_branch_is_scaled(preset, c, seed):
    config = ModelConfig(hidden_dim=2 * c, num_heads=1, mhc_flows=1, mhc_preset=preset)
    params = perturbed_params(config.replace(num_layers=1, vocab_size=2), seed).layers[0].attn_mhc
    x = torch.randn(3, 1, 2 * c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pre, post, res = fn.mhc_mappings(params, x, preset=preset)
    out = fn.mhc_combine(x, torch.sin(fn.mhc_aggregate(x, pre)), post, res)
    assert torch.allclose(res, torch.ones_like(res), atol=1e-5)
    assert torch.allclose(out, res * x + post.unsqueeze(-1) * torch.sin(pre.unsqueeze(-1) * x), atol=1e-12)


@given(configs(mhc_enabled=True), seeds)
def test_a_sub_layer_mixes_reads_and_writes_streams_as_written(config, seed):
    generator = torch.Generator().manual_seed(seed)
    params = perturbed_params(config, seed).layers[0].attn_mhc
    n, c = config.mhc_flows, config.hidden_dim
    x = torch.randn(2, n, c, generator=generator, dtype=torch.float64)
    given_pre = torch.rand(2, n, generator=generator, dtype=torch.float64)
    early = PRESETS[config.mhc_preset].early_pre
    out, (res,), _ = fn.hyper_connection(params, fn.Hidden(x, given_pre if early else ()), torch.sin, config)
    pre, post, _ = fn.mhc_mappings(params, x, **config.mhc_options)
    branch = torch.sin(torch.einsum("bj,bjc->bc", given_pre if early else pre, x))
    expected = torch.einsum("bij,bjc->bic", res, x) + torch.einsum("bi,bc->bic", post, branch)
    assert torch.allclose(out.x, expected, atol=1e-10)
    assert not early or torch.equal(out.pre, pre)


@given(configs(), seeds)
def test_jvp_of_the_loss_is_the_product_of_gradient_and_direction(config, seed):
    params, direction = perturbed_params(config, seed), perturbed_params(config, seed + 1)
    batch = random_batch(config, 2, 5, seed=seed)
    _, slope = torch.func.jvp(lambda p: fn.loss(p, batch, config), (params,), (direction,))
    grads = torch.func.grad(fn.loss)(params, batch, config)
    assert torch.allclose(slope, inner(grads, direction), rtol=1e-8, atol=1e-9)


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
def test_gradient_of_the_loss_equals_the_central_difference(config, seed):
    params, batch = perturbed_params(config, seed), random_batch(config, 2, 5, seed=seed, ignored=0.2)
    assume((batch.targets >= 0).any())
    direction = perturbed_params(config, seed + 1)
    step = 1e-5
    up, down = (
        fn.loss(tree_map(lambda w, d, s=sign: w + s * step * d, params, direction), batch, config) for sign in (1, -1)
    )
    grads = torch.func.grad(fn.loss)(params, batch, config)
    assert torch.allclose(inner(grads, direction), (up - down) / (2 * step), rtol=1e-4, atol=1e-6)


@given(st.sampled_from(list(PRESETS)), st.integers(1, 4), seeds)
def test_streams_enter_equal_and_leave_as_the_preset_has_it(preset, n, seed):
    config = ModelConfig(
        hidden_dim=6, num_heads=3, num_layers=1, vocab_size=3, mhc_preset=preset, mhc_flows=n & ~1 or 1
    )
    params, n = perturbed_params(config, seed), config.mhc_flows
    x = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    hidden = fn.expand(x, config)
    early, learned = PRESETS[preset].early_pre, params.head_mhc
    streams = hidden.x * torch.arange(1, n + 1).view(n, 1)
    weights = torch.full((2, 1, n), 1 / n, dtype=torch.float64)
    if early:
        assert torch.equal(hidden.pre, torch.eye(n, dtype=torch.float64)[0].expand(2, 1, n))
        weights = torch.rand(2, 1, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if learned:
        h = streams.flatten(-2) / (streams.flatten(-2).square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        weights = (learned.alpha * (h @ learned.phi) + learned.bias).sigmoid() + 1e-6
    out = fn.collapse(params, fn.Hidden(streams, weights if early else ()), config)
    assert torch.allclose(out, (weights.unsqueeze(-1) * streams).sum(-2), atol=1e-12)


@given(st.integers(1, 4), seeds)
def test_hc_adds_a_bounded_change_to_its_biases(n, seed):
    config = ModelConfig(hidden_dim=2, num_heads=1, num_layers=1, vocab_size=3, mhc_preset="hc", mhc_flows=n)
    params = perturbed_params(config, seed).layers[0].attn_mhc
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scale = params.alpha.repeat_interleave(torch.tensor([n, n, n * n]))
    h = x.flatten() @ params.phi / (x.square().mean() + 1e-6).sqrt()
    pre, post, res = fn.mhc_mappings(params, x, preset="hc")
    assert torch.allclose(torch.cat([pre, post, res.flatten()]), scale * h.tanh() + params.bias)
