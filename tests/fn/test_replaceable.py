"""A function in place of any weights of a model is called with what the weights' function gets."""

import pytest
import torch

from rlm_mhc import fn
from rlm_mhc.fn.attention import self_attention
from rlm_mhc.fn.mlp import mlp
from rlm_mhc.fn.norm import norm
from rlm_mhc.fn.replaceable import is_present, replaceable
from rlm_mhc.testing import small_config
from rlm_mhc.testing.models import perturbed

CONFIG = small_config(mhc_preset="deepseek_v4", qk_norm=True, tie_embeddings=False)


def normalise(x, weight):
    return fn.rms_norm(x, weight, CONFIG.norm_eps)


# How a function computes what the weights of a part of the model do.
PARTS = {
    "embed_tokens": lambda own: lambda tokens: fn.embedding(own, tokens),
    "lm_head": lambda own: lambda x: fn.linear(own, x),
    "norm": lambda own: lambda x: norm(own, x, normalise),
    "head_mhc": lambda own: lambda x: fn.collapse_learned(own, x, eps=CONFIG.norm_eps, preset=CONFIG.mhc_preset),
}
OF_LAYER = {
    "input_layernorm": PARTS["norm"],
    "post_attention_layernorm": PARTS["norm"],
    "mlp": lambda own: lambda x: mlp(own, x),
    "self_attn": lambda own: lambda *args: self_attention(own, *args),
    "mlp_mhc": lambda own: lambda x, branch, has_aux: fn.hyper_connection(own, fn.Hidden(x), branch, CONFIG).hidden.x,
}
OF_ATTENTION = {"q_proj": PARTS["lm_head"], "o_proj": PARTS["lm_head"], "q_norm": PARTS["norm"]}


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("name", [*PARTS, *OF_LAYER, *OF_ATTENTION])
def test_a_function_stands_in_for_weights(name):
    params = perturbed(fn.init(CONFIG))
    tokens = torch.tensor([[1, 2, 3]])
    calls, layer = [], params.layers[0]

    def counted(run):
        return lambda *args: calls.append(1) or run(*args)

    def swapped(tree, build):
        return tree._replace(**{name: counted(build(getattr(tree, name)))})

    if name in PARTS:
        other = swapped(params, PARTS[name])
    else:
        within = name in OF_ATTENTION
        part = layer.self_attn if within else layer
        part = swapped(part, (OF_ATTENTION if within else OF_LAYER)[name])
        own = layer._replace(self_attn=part) if within else part
        other = params._replace(layers=(own, *params.layers[1:]))
    assert torch.equal(fn.forward(other, tokens, CONFIG), fn.forward(params, tokens, CONFIG))
    assert calls == [1]


def test_only_the_first_arguments_are_handed_on():
    run = replaceable(2)(lambda params, a, b, c=0: (params, a, b, c))
    assert run("weights", 1, 2, c=3) == ("weights", 1, 2, 3)
    assert run(lambda *args: args, 1, 2, c=3) == (1, 2)
    assert [is_present(x) for x in ((), (1,), abs, torch.nn.Linear(1, 1))] == [False, True, True, True]
