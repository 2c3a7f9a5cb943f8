"""What is planned, against what autograd-free steps of the program really keep and allocate."""

import pytest
import torch

from rlm_mhc import TrainConfig, fn
from rlm_mhc.kernels.launch import interpreted
from rlm_mhc.kernels.mixing import TRITON
from rlm_mhc.program import init_train_state, make_train_step
from rlm_mhc.program.functions import make_functions
from rlm_mhc.program.memory import count_activations
from rlm_mhc.testing import random_batch, small_config
from rlm_mhc.testing.memory import peak_bytes
from rlm_mhc.tree import named_leaves, tree_leaves

SHAPE = dict(hidden_dim=128, num_layers=6, num_heads=4, num_kv_heads=4, ffn_dim=384, vocab_size=1024)


@pytest.mark.parametrize(("mhc", "kernels"), [(True, fn.REFERENCE), (True, TRITON), (False, fn.REFERENCE)])
def test_what_is_kept_is_counted_exactly(mhc, kernels):
    if kernels is TRITON and not interpreted():
        pytest.skip("fused mixing runs on the CPU in Triton's interpreter alone")
    config = small_config(**SHAPE, mhc_enabled=mhc, mhc_sinkhorn_iters=2)
    run = make_functions(config, kernels, "none")
    params, tokens = fn.init(config), random_batch(config, 4, 64).tokens
    cos, sin = fn.rotary_table(torch.arange(64), config.head_width)
    hidden = run.embed(params.embed_tokens.weight, tokens)
    alive = []
    for layer in params.layers:
        alive += tree_leaves(hidden)
        hidden, kept, _ = run.forward(named_leaves(layer) | {"cos": cos, "sin": sin}, hidden)
        alive += tree_leaves(kept)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}
    assert count_activations(config, 4, 64, torch.float32, "none", "cpu", kernels).kept == sum(storages.values())


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("remat", ["none", "mhc", "full"])
def test_the_peak_of_a_compiled_step_is_near_the_plan(remat):
    config = small_config(**SHAPE, max_seq_len=256)
    training = TrainConfig(
        batch_size=4, gradient_accumulation_steps=1, mixed_precision="fp32", remat=remat, optimizer={"lr": 1e-3}
    )
    state, batch = init_train_state(config, training, device="cpu"), random_batch(config, 4, 256)
    step = make_train_step(config, training, donate=True)
    for _ in range(2):
        state, _ = step(state, batch)
    peak = peak_bytes(lambda: step(state, batch), torch.device("cpu"))
    top = 4 * (config.vocab_size + 1) * config.hidden_dim
    planned = count_activations(config, 4, 256, torch.float32, remat, "cpu").peak(
        4 * fn.count(config), top, config.num_layers, accumulated=False
    )
    assert 0.85 <= planned / peak <= 1.15


def test_fused_mixing_of_many_streams_works_with_a_state_more():
    """Their cotangent is combined by a kernel of its own, into memory of its own."""

    def scratch(flows, batch):
        config = small_config(mhc_flows=flows)
        return count_activations(config, batch, 64, torch.float32, "none", "cpu", TRITON).layer

    def states(flows):  # of a longer batch, what does not grow with it being left out
        grown = scratch(flows, 400) - scratch(flows, 200)
        return grown / (200 * 64 * flows * small_config().hidden_dim * 4)

    # Two cotangents of the streams and two of one stream.
    assert states(4) == 2 + 2 / 4
    assert states(5) == 2 + 2 / 5 + 1
