import pytest
import torch

from rlm_mhc import ModelConfig, fn
from rlm_mhc.params import weight_table
from rlm_mhc.testing import small_config
from rlm_mhc.tree import from_named, named_leaves, ravel, tree_leaves, unravel

LAYER = [
    "attn_mhc.phi",
    "attn_mhc.alpha",
    "attn_mhc.bias",
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "mlp_mhc.phi",
    "mlp_mhc.alpha",
    "mlp_mhc.bias",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
]


def test_names_are_llamas_plus_mhc():
    expected = ["embed_tokens.weight", *[f"layers.{i}.{w}" for i in range(2) for w in LAYER], "norm.weight"]
    assert fn.names(small_config()) == expected
    assert fn.names(small_config(tie_embeddings=False)) == [*expected, "lm_head.weight"]


def test_without_mhc_there_is_no_mhc_weight():
    config = small_config(mhc_enabled=False)
    assert not [name for name in fn.names(config) if "mhc" in name]
    assert fn.count(config) == sum(w.numel() for w in tree_leaves(fn.init(config)))


def test_initial_values_follow_the_table():
    config = small_config(hidden_dim=256, num_layers=4)
    layer = fn.init(config).layers[0]
    assert torch.equal(layer.attn_mhc.alpha, torch.full((3,), 0.01))
    assert layer.attn_mhc.phi.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert torch.equal(layer.input_layernorm.weight, torch.ones(256))
    pre, post, res = layer.attn_mhc.bias.split([4, 4, 16])
    torch.testing.assert_close(pre.sigmoid(), torch.full((4,), 0.25))
    assert torch.equal(post, torch.zeros(4))
    assert fn.sinkhorn_knopp(res.view(4, 4)).diagonal().min() >= 0.99


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_res_starts_near_the_identity_for_any_number_of_streams(n):
    config = small_config(mhc_flows=n)
    bias = fn.init(config).layers[0].mlp_mhc.bias[2 * n :].view(n, n)
    assert fn.sinkhorn_knopp(bias).diagonal().min() >= 0.99


def test_init_depends_on_seed_and_name_alone():
    a, b = fn.init(small_config(), seed=1), fn.init(small_config(num_layers=3), seed=1)
    assert torch.equal(a.layers[1].mlp.up_proj.weight, b.layers[1].mlp.up_proj.weight)
    assert not torch.equal(a.layers[0].mlp.up_proj.weight, a.layers[1].mlp.up_proj.weight)
    assert not torch.equal(a.embed_tokens.weight, fn.init(small_config(), seed=2).embed_tokens.weight)


def test_leaves_do_not_share_memory():
    leaves = tree_leaves(fn.init(small_config()))
    assert len({leaf.untyped_storage().data_ptr() for leaf in leaves}) == len(leaves)


@pytest.mark.parametrize(
    ("dtype", "mhc"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_mhc_weights_are_never_narrower_than_fp32(dtype, mhc):
    for params in (fn.init(small_config(), dtype=dtype), fn.cast(fn.init(small_config()), small_config(), dtype)):
        named = named_leaves(params)
        assert {leaf.dtype for name, leaf in named.items() if "mhc" in name} == {mhc}
        assert {leaf.dtype for name, leaf in named.items() if "mhc" not in name} == {dtype}


def test_meta_tree_needs_no_memory():
    params = fn.init(ModelConfig.preset("7b"), device="meta")
    assert sum(w.numel() for w in tree_leaves(params)) == fn.count(ModelConfig.preset("7b"))


def test_weight_decay_reaches_matrices_alone():
    decayed = {name for name, flag in named_leaves(fn.decay_mask(small_config())).items() if flag}
    table = named_leaves(weight_table(small_config()))
    assert decayed == {name for name, spec in table.items() if len(spec.shape) == 2}


def test_trees_and_vectors_and_names_are_inverse():
    params = fn.init(small_config())
    for again in (unravel(ravel(params), params), from_named(params, named_leaves(params))):
        pairs = zip(tree_leaves(params), tree_leaves(again), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
