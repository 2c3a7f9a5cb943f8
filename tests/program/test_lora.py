"""The step of adapters: its gradients are those of the loss through the merge, and peft's."""

import pytest
import torch

from rlm_mhc import fn
from rlm_mhc.config import LoraConfig
from rlm_mhc.params import cast
from rlm_mhc.program import make_train_step
from rlm_mhc.program.gradients import make_gradients
from rlm_mhc.program.state import resume_train_state
from rlm_mhc.program.weight_source import lora_source
from rlm_mhc.testing import assert_as_accurate, assert_trees_close, random_batch, small_config
from rlm_mhc.testing.models import double, perturbed, small_training
from rlm_mhc.tree import named_leaves, size, tree_leaves, tree_map

LORA = LoraConfig(rank=3, alpha=6)


def subject(lora=LORA, dtype=torch.float32, **changes):
    """A config, base weights, adapters that do something, and the source of weights made of them."""
    config = small_config(num_layers=5, mhc_sinkhorn_iters=3, **changes)
    base = tree_map(lambda w: w.to(dtype), perturbed(fn.init(config), 0.05))
    trained = tree_map(lambda w: w.to(dtype), perturbed(fn.lora_init(base, lora), 0.05))
    return config, base, trained, lora_source(base, trained, lora)


def exact_gradient(base, trained, batch, config, lora):
    return torch.func.grad(lambda own: fn.loss(fn.lora_merge(base, own, lora.scale), batch, config))(trained)


@pytest.mark.parametrize("remat", ["none", "mhc", "full"])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("preset", ["paper", "deepseek_v4"])
def test_gradients_are_those_of_the_loss_through_the_merge(remat, reduced, preset):
    config, base, trained, weight_source = subject(dtype=torch.float64, mhc_preset=preset)
    batch = random_batch(config, 4, 9, ignored=0.3)
    halves = [fn.Batch(*part) for part in zip(*(x.split(2) for x in batch), strict=True)]
    reduce = (lambda vector: vector.clone()) if reduced else None
    gradients = make_gradients(config, fn.REFERENCE, reduce=reduce, remat=remat, weight_source=weight_source)
    scale = 1 / fn.count_targets(batch.targets).double()
    ours = gradients(trained, halves, scale)
    torch.testing.assert_close(ours.loss, fn.loss(fn.lora_merge(base, trained, LORA.scale), batch, config))
    expected = exact_gradient(base, trained, batch, config, LORA)
    assert_trees_close(ours.grads, expected, 1e-12, floor=1e-3)


@pytest.mark.parametrize("lora", [LoraConfig(rank=2, targets=["q_proj"], train_mhc=False), LoraConfig(rank=1)])
def test_reduce_sees_gradients_of_adapters_alone(lora):
    config, base, trained, weight_source = subject(lora, mhc_enabled=lora.rank != 1)
    batch, seen = random_batch(config, 2, 9), []
    gradients = make_gradients(
        config, fn.REFERENCE, reduce=lambda v: seen.append(v.numel()) or v, weight_source=weight_source
    )
    grads = gradients(trained, [batch], torch.tensor(1 / 18)).grads
    assert seen == [size(layer) for layer in reversed(trained.layers)]
    plain, exact = (exact_gradient(*trees, batch, config, lora) for trees in ((base, trained), double((base, trained))))
    assert_as_accurate(grads, plain, exact)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_steps_train_adapters_and_leave_the_base(precision):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    config = small_config()
    base = cast(fn.init(config), config, dtype)
    before = tree_map(torch.clone, base)
    trained = fn.lora_init(base, LORA)
    step = make_train_step(
        config,
        small_training(mixed_precision=precision, scheduler={"warmup_steps": 1}),
        donate=True,
        weight_source=lora_source(base, trained, LORA),
    )
    state = resume_train_state(trained, fn.adamw_init(trained), 0)
    batch = random_batch(config, 4, 9)
    losses = []
    for _ in range(8):
        state, metrics = step(state, batch)
        losses.append(metrics["loss"].item())
    assert losses[-1] < losses[0] - 0.1
    assert_trees_close(base, before, 0.0)
    assert {leaf.dtype for leaf in tree_leaves(state.params)} == {torch.float32}
    assert metrics.keys() >= {"grad_norm/layer_0", "mhc/gain_backward"}


@pytest.mark.parametrize("preset", ["paper", "deepseek_v4"])
def test_loss_and_gradients_are_pefts(preset):
    peft = pytest.importorskip("peft")
    from rlm_mhc.model import RLMModel

    config, base, trained, weight_source = subject(mhc_preset=preset)
    model = RLMModel(config)
    with torch.no_grad():
        tree_map(torch.Tensor.copy_, model.tree(), base)
    sites = ["attn_mhc", "mlp_mhc", *(["head_mhc"] if base.head_mhc else [])]
    given = peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(LORA.targets), modules_to_save=sites)
    theirs = peft.get_peft_model(model, given)
    own = {f"base_model.model.model.{name}": leaf for name, leaf in named_leaves(trained).items()}
    parameters = {
        name.replace("modules_to_save.default.", "").replace(".default.weight", ""): p
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert parameters.keys() == own.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(own[name])
    tokens = torch.randint(config.vocab_size, (3, 9))

    def loss_and_gradients():
        theirs.zero_grad()
        loss = theirs(tokens, labels=tokens).loss
        loss.backward()
        return loss.detach(), {name: parameter.grad.clone() for name, parameter in parameters.items()}

    plain = loss_and_gradients()
    theirs.double()
    exact = loss_and_gradients()
    batch = fn.Batch(tokens, torch.cat([tokens[:, 1:], torch.full((3, 1), -100)], dim=1))
    gradients = make_gradients(config, fn.REFERENCE, weight_source=weight_source)
    ours = gradients(trained, [batch], 1 / fn.count_targets(batch.targets).float())
    assert_as_accurate(ours.loss, plain[0], exact[0])
    grads = {f"base_model.model.model.{name}": leaf for name, leaf in named_leaves(ours.grads).items()}
    assert_as_accurate(grads, plain[1], exact[1])


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
def test_the_compiled_step_has_the_same_gradients():
    config, base, trained, weight_source = subject()
    batch = random_batch(config, 2, 9)
    gradients = make_gradients(config, fn.REFERENCE, compiled=True, weight_source=weight_source)
    for _ in range(2):
        ours = gradients(trained, [batch], torch.tensor(1 / 18)).grads
    plain, exact = (exact_gradient(*trees, batch, config, LORA) for trees in ((base, trained), double((base, trained))))
    assert_as_accurate(ours, plain, exact)
