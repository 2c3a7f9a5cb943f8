"""What the compiled functions compute, and how often: products and attentions counted in their traced graphs."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from rlm_mhc import fn
from rlm_mhc.program.functions import make_functions
from rlm_mhc.testing import random_batch, small_config
from rlm_mhc.testing.models import perturbed
from rlm_mhc.tree import named_leaves

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear"}


def operations(f, *arguments):
    """How often each ATen operation is in the graph of `f`, what does not reach its outputs left out."""
    graph = make_fx(f)(*arguments).graph
    graph.eliminate_dead_code()
    names = [node.target.overloadpacket.__name__ for node in graph.nodes if hasattr(node.target, "overloadpacket")]
    counts = Counter("product" if name in PRODUCTS else name for name in names)
    attention = {name: n for name, n in counts.items() if "attention" in name}
    return counts["product"], sorted(attention.values()), sorted(attention)


def arguments_of(config, remat, kernels=fn.REFERENCE):
    params = fn.init(config)
    functions = make_functions(config, kernels, remat)
    cos, sin = fn.rotary_table(torch.arange(16), config.head_width)
    weights = named_leaves(params.layers[0]) | {"cos": cos, "sin": sin}
    hidden = functions.embed(params.embed_tokens.weight, random_batch(config, 2, 16).tokens)
    return functions, params, weights, perturbed(hidden)


PARTIALS = fn.REFERENCE._replace(
    attention=partial(fn.causal_attention),
    swiglu=partial(partial(fn.swiglu)),
    mhc_mappings=partial(fn.mhc_mappings, num_iters=3),  # which the program names itself
)


@pytest.mark.parametrize(("mhc", "phi_forward", "phi_backward"), [(False, 0, 0), (True, 2, 4)])
@pytest.mark.parametrize("kernels", [fn.REFERENCE, PARTIALS], ids=["reference", "partials"])
def test_no_product_with_a_weight_and_no_attention_is_computed_twice(mhc, phi_forward, phi_backward, kernels):
    functions, _, weights, hidden = arguments_of(small_config(mhc_enabled=mhc), "none", kernels)
    forward, _, names = operations(functions.forward, weights, hidden)
    assert forward == 7 + phi_forward  # q, k, v, o, gate, up, down
    assert names == ["_scaled_dot_product_flash_attention_for_cpu"]
    _, kept, _ = functions.forward(weights, hidden)
    backward, attentions, names = operations(functions.backward, weights, hidden, kept, perturbed(hidden))
    assert backward == 14 + phi_backward  # of each product, the gradients of its two factors
    assert names == ["_scaled_dot_product_flash_attention_for_cpu_backward"]
    assert attentions == [1]


def test_the_head_computes_its_product_once():
    functions, params, _, hidden = arguments_of(small_config(), "none")
    targets, scale = torch.zeros(32, dtype=torch.int64), torch.tensor(1.0)
    top = (params.norm.weight, params.embed_tokens.weight)
    count, _, _ = operations(functions.head, top, fn.Hidden(hidden.x.flatten(0, 1)), targets, scale)
    assert count == 3


def test_with_full_recomputation_everything_is_computed_twice_which_the_count_shows():
    functions, _, weights, hidden = arguments_of(small_config(mhc_enabled=False), "full")
    _, kept, _ = functions.forward(weights, hidden)
    assert kept == ()
    count, _, names = operations(functions.backward, weights, hidden, kept, perturbed(hidden))
    assert count == 14 + 6  # the last product, down, ends the block: its output is not needed
    assert len(names) == 2


def test_streams_are_replayed_without_any_product():
    functions, _, weights, hidden = arguments_of(small_config(), "mhc")
    expected, kept, _ = functions.forward(weights, hidden)
    torch.testing.assert_close(functions.replay(hidden, kept), expected)
    assert operations(functions.replay, hidden, kept)[0] == 0
