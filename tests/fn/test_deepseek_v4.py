"""Against transformers' DeepSeek-V4, which is not our code. Its `comb` is our `res` transposed."""

import pytest
import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config as Config

from rlm_mhc import fn


def twins(n, width, seed=0):
    """Their module with random weights, and our parameters with the same."""
    config = Config(hc_mult=n, hidden_size=width, hc_eps=0.0, hc_sinkhorn_iters=20, rms_norm_eps=1e-6)
    generator = torch.Generator().manual_seed(seed)
    module = v4.DeepseekV4HyperConnection(config)
    for weight in module.parameters():
        weight.data.normal_(generator=generator)
    size = 2 * n + n * n
    # Row-major (in, out) of comb becomes row-major (out, in) of res.
    order = torch.cat([torch.arange(2 * n), 2 * n + torch.arange(n * n).view(n, n).T.flatten()])
    assert order.shape == (size,)
    params = fn.MHCParams(module.fn.data[order].T.contiguous(), module.scale.data, module.base.data[order])
    return module, params


@pytest.mark.parametrize("n", [2, 4, 8])
def test_mappings_aggregate_and_combine_agree(n):
    module, params = twins(n, width=24)
    streams, output = torch.randn(2, 5, n, 24), torch.randn(2, 5, 24)
    with torch.no_grad():
        post, comb, collapsed = module(streams)
    ours = fn.mhc_mappings(params, streams)
    close = dict(atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.post, post, **close)
    torch.testing.assert_close(ours.res, comb.mT, **close)
    torch.testing.assert_close(fn.mhc_aggregate(streams, ours.pre), collapsed, **close)
    theirs = post.unsqueeze(-1) * output.unsqueeze(-2) + comb.mT @ streams
    torch.testing.assert_close(fn.mhc_combine(streams, output, ours.post, ours.res), theirs, **close)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_untransposed_weights_would_be_noticed(n):
    module, _ = twins(n, width=24)
    wrong = fn.MHCParams(module.fn.data.T.contiguous(), module.scale.data, module.base.data)
    streams = torch.randn(2, 5, n, 24)
    with torch.no_grad():
        _, comb, _ = module(streams)
    assert (fn.mhc_mappings(wrong, streams).res - comb.mT).abs().max() > 1e-2
