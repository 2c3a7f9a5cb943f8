"""Each preset against code that is not ours: transformers' DeepSeek-V4, tile-kernels, hyper-connections."""

import pytest
import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from rlm_mhc import fn
from rlm_mhc.convert import mhc_from_deepseek_v4
from rlm_mhc.testing import assert_as_accurate, random_batch, small_config
from rlm_mhc.testing.models import double, perturbed
from rlm_mhc.tree import named_leaves
from rlm_mhc.variants import PRESETS

WIDTH = 24


def theirs(kind, n, seed=0, **fields):
    """A module of theirs with random weights, its other options their own defaults."""
    module = kind(DeepseekV4Config(hc_mult=n, hidden_size=WIDTH, **fields))
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.data.normal_(generator=generator)
    return module.requires_grad_(False)


@pytest.fixture
def accurate(monkeypatch):
    """Check ours against theirs, functions of tensors, with theirs in float64 as the exact one."""

    def check(ours, theirs, *inputs):
        actual, plain = ours(*inputs), theirs(*inputs)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # which they cast to
            exact = theirs(*double(inputs))
        assert exact[0].dtype == torch.float64
        assert_as_accurate(actual, plain, exact)

    return check


def ours(module):
    return mhc_from_deepseek_v4(module.state_dict())


def mixed(streams, output, post, comb):
    """What their decoder layer does with it."""
    return post.unsqueeze(-1) * output.unsqueeze(-2) + comb.mT @ streams


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_deepseek_v4_is_that_of_transformers_with_its_own_eps(n, accurate):
    module = theirs(v4.DeepseekV4HyperConnection, n)
    assert module.hc_eps == PRESETS["deepseek_v4"].eps == 1e-6
    streams, output = torch.randn(2, 5, n, WIDTH), torch.randn(2, 5, WIDTH)

    def mine(streams, output):
        pre, post, res = fn.mhc_mappings(ours(module), streams, preset="deepseek_v4")
        return post, res, fn.mhc_aggregate(streams, pre), fn.mhc_combine(streams, output, post, res)

    def other(streams, output):
        post, comb, collapsed = module.to(streams)(streams)
        return post, comb.mT, collapsed, mixed(streams, output, post, comb)

    accurate(mine, other, streams, output)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_the_learned_head_is_that_of_transformers(n, accurate):
    module, streams = theirs(v4.DeepseekV4HyperHead, n), torch.randn(2, 5, n, WIDTH)
    accurate(lambda x: (fn.collapse_learned(ours(module), x),), lambda x: (module.to(x)(x),), streams)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_paper_is_theirs_without_eps(n, accurate):
    module, streams = theirs(v4.DeepseekV4HyperConnection, n, hc_eps=0.0), torch.randn(2, 5, n, WIDTH)

    def mine(streams):
        pre, post, res = fn.mhc_mappings(ours(module), streams)
        return post, res, fn.mhc_aggregate(streams, pre)

    def other(streams):
        post, comb, collapsed = module.to(streams)(streams)
        return post, comb.mT, collapsed

    accurate(mine, other, streams)


@pytest.mark.parametrize("n", [2, 4])
def test_the_eps_of_deepseek_v4_shows_in_float64(n):
    params, streams = ours(theirs(v4.DeepseekV4HyperConnection, n)), torch.randn(3, n, WIDTH).double()
    paper, deepseek = (fn.mhc_mappings(params, streams, preset=name) for name in ("paper", "deepseek_v4"))
    assert (paper.pre - deepseek.pre).abs().max() > 9e-7
    assert (paper.res - deepseek.res).abs().max() > 1e-8
    assert (1 - deepseek.res.sum(-1)).min() > 1e-7


def early_pre_by_hand(modules, x, branches):
    """Sub-layers whose `pre` comes from the one before, of their modules: the first reads stream 0, the last `pre`
    collapses the streams. Their modules give `pre` only applied, so it is written out here."""
    streams = x.unsqueeze(-2).repeat_interleave(4, -2)
    u = streams[..., 0, :]
    for module, branch in zip(modules, branches, strict=True):
        post, comb, _ = module(streams)
        flat = module.input_norm(streams.flatten(-2)) @ module.fn.T
        pre = torch.sigmoid(flat[..., :4] * module.scale[0] + module.base[:4]) + module.hc_eps
        streams = mixed(streams, branch(u), post, comb)
        u = (pre.unsqueeze(-1) * streams).sum(-2)
    return u


def test_single_pass_takes_pre_from_the_sub_layer_before(accurate):
    config = small_config(hidden_dim=WIDTH, head_dim=6, num_layers=2, mhc_preset="single_pass")
    modules = [theirs(v4.DeepseekV4HyperConnection, 4, seed) for seed in range(4)]
    branches = [lambda u, k=k: torch.tanh(k + u.roll(k, -1)) for k in range(4)]
    x = torch.randn(2, 5, WIDTH)

    def mine(x):
        hidden = fn.expand(x, config)
        for module, branch in zip(modules, branches, strict=True):
            hidden = fn.hyper_connection(ours(module), hidden, branch, config).hidden
        return (fn.collapse(fn.init(config), hidden, config),)

    accurate(mine, lambda x: (early_pre_by_hand([module.to(x) for module in modules], x, branches),), x)


def test_identity_adds_to_every_stream_and_mixes_none():
    config = small_config(mhc_preset="identity")
    params = perturbed(fn.init(config)).layers[0].attn_mhc
    streams = torch.randn(2, 5, 4, 32)
    (out, _), (res,), _ = fn.hyper_connection(params, fn.Hidden(streams), torch.sin, config)
    paper = fn.mhc_mappings(params, streams, preset="identity")
    expected = streams + paper.post.unsqueeze(-1) * torch.sin(fn.mhc_aggregate(streams, paper.pre)).unsqueeze(-2)
    torch.testing.assert_close(out, expected)
    assert torch.equal(res, torch.eye(4).expand_as(res))


def test_hc_is_that_of_hyper_connections(accurate):
    """Theirs norms each stream and projects it alone; on streams of one norm that is a block-diagonal `phi`."""
    peer = pytest.importorskip("hyper_connections.hyper_connections", reason="hyper-connections is not installed")
    n, c = 4, WIDTH
    module = peer.HyperConnections(n, dim=c, branch=torch.nn.Tanh(), layer_index=1).requires_grad_(False)
    for weight in module.parameters():
        weight.normal_()
    module.norm.gamma.zero_() if hasattr(module.norm, "gamma") else module.norm.weight.fill_(1)
    streams = torch.nn.functional.normalize(torch.randn(5, n, c), dim=-1) * c**0.5
    phi = torch.zeros(n, c, 2 * n + n * n)
    res = phi[..., 2 * n :].unflatten(-1, (n, n))
    for j in range(n):  # what theirs sends from stream j to t, ours has at res[t, j]
        phi[j, :, j] = module.dynamic_alpha_fn[:, 0]
        phi[j, :, n + j] = module.dynamic_beta_fn
        res[j, :, :, j] = module.dynamic_alpha_fn[:, 1:]
    bias = torch.cat([module.static_alpha[:, 0], module.static_beta, module.static_alpha[:, 1:].T.flatten()])
    scales = module.dynamic_alpha_scale, module.dynamic_beta_scale, module.dynamic_alpha_scale
    params = fn.MHCParams(phi.flatten(0, 1), torch.stack(scales), bias)
    config = small_config(mhc_preset="hc", norm_eps=1e-12)

    def other(streams):  # theirs has the streams in the batch
        return (module.to(streams)(streams.transpose(0, 1)).transpose(0, 1),)

    accurate(lambda x: (fn.hyper_connection(params, fn.Hidden(x), torch.tanh, config)[0].x,), other, streams)


@pytest.mark.parametrize("n", [2, 4])
def test_deepseek_v4_is_that_of_tile_kernels(tile_kernels, n):
    params = ours(theirs(v4.DeepseekV4HyperConnection, n))
    streams, output = torch.randn(2, 5, n, WIDTH), torch.randn(2, 5, WIDTH)
    module = theirs(v4.DeepseekV4HyperConnection, n)
    h = tile_kernels.mhc_pre_norm_fn_ref(streams, module.fn, None, 1e-6)
    pre, post, raw = tile_kernels.mhc_pre_split_mixes_ref(h, module.scale, module.base, n, 2.0, 1e-6)
    comb = tile_kernels.sinkhorn_normalize_ref(raw, repeat=20, eps=1e-6)
    mine, exact = (
        fn.mhc_mappings(p, x, preset="deepseek_v4") for p, x in ((params, streams), double((params, streams)))
    )
    assert_as_accurate(fn.MHCMappings(pre.squeeze(-1), post.squeeze(-1), comb.mT), mine, exact)  # theirs has no float64
    theirs_out = tile_kernels.mhc_post_ref(output, streams, post, comb)  # theirs rounds to bf16
    combined = fn.mhc_combine(streams, output, mine.post, mine.res)
    torch.testing.assert_close(combined.bfloat16(), theirs_out, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(fn.expand_streams(output, n), tile_kernels.expand_to_mhc_ref(output, n))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_says_where_it_is_from_and_makes_a_model(preset):
    assert PRESETS[preset].source
    config = small_config(mhc_preset=preset)
    params, batch = fn.init(config), random_batch(config, 2, 9)
    grads = torch.func.grad(fn.loss)(perturbed(params), batch, config)
    dead = {name for name, g in named_leaves(grads).items() if not g.any() or not g.isfinite().all()}
    assert not dead


def test_parameters_of_another_preset_are_refused():
    params, config = fn.init(small_config(mhc_preset="deepseek_v4")), small_config()
    with pytest.raises(ValueError, match="another preset"):
        fn.forward(params, torch.zeros(1, 3, dtype=torch.int64), config)
    with pytest.raises(ValueError, match="the k of kronecker"):
        fn.mhc_mappings(params.layers[0].attn_mhc, torch.zeros(4, 32), projection="kronecker")
    with pytest.raises(ValueError, match="preset='nonsense'"):
        fn.mhc_mappings(params.layers[0].attn_mhc, torch.zeros(4, 32), preset="nonsense")
