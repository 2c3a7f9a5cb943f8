import pytest
import torch

from rlm_mhc import fn
from rlm_mhc.program import init_train_state, make_train_step
from rlm_mhc.program.functions import checkpoint_interval
from rlm_mhc.program.head import LOGITS_AT_ONCE, chunk_tokens
from rlm_mhc.program.precision import LossScale, next_loss_scale
from rlm_mhc.testing import assert_as_accurate, assert_trees_close, random_batch, small_config
from rlm_mhc.testing.models import double, perturbed, small_training
from rlm_mhc.tree import tree_leaves, tree_map

METRICS = {"loss", "grad_norm", "lr", "mhc/amax_pre", "mhc/amax_post", "mhc/gain_forward", "mhc/gain_backward"}


def run(config, train_config, batch, steps=1, **options):
    state = init_train_state(config, train_config, device="cpu")
    step = make_train_step(config, train_config, **options)
    for _ in range(steps):
        state, metrics = step(state, batch)
    return state, metrics


def gradient(config, train_config, batch):
    """The gradient that a step computes, seen through its `reduce`."""
    seen = []
    run(config, train_config, batch, reduce=lambda g: seen.append(g.clone()) or g)
    count, *layers, rest, loss = seen
    assert count.shape == loss.shape == (1,)
    return [rest, *reversed(layers)]


def reference(config, batch, dtype=torch.float64):
    """The gradient of the loss at the initial weights in a dtype, by plain autograd, cut as that of a step."""
    params = fn.cast(fn.init(config), config, dtype)
    grads = torch.func.grad(fn.loss)(double(params) if dtype == torch.float64 else params, batch, config)
    groups = [grads._replace(layers=()), *grads.layers]
    return [torch.cat([leaf.flatten() for leaf in tree_leaves(group)]) for group in groups]


@pytest.mark.parametrize("mhc", [True, False])
def test_gradient_equals_that_of_the_reference(mhc):
    config, train_config = small_config(mhc_enabled=mhc), small_training()
    batch = random_batch(config, 4, 9, ignored=0.3)
    plain, exact = reference(config, batch, torch.float32), reference(config, batch)
    assert_as_accurate(gradient(config, train_config, batch), plain, exact)


def test_accumulation_equals_one_large_batch():
    config = small_config()
    batch = random_batch(config, 6, 9, ignored=0.4)
    whole, whole_metrics = run(config, small_training(6, 1), batch)
    grads, loss = torch.func.grad_and_value(fn.loss)(double(fn.init(config)), batch, config)
    exact = {"loss": loss, "grad_norm": fn.global_norm(grads)}
    for size, count in ((3, 2), (2, 3), (1, 6)):
        plain = gradient(config, small_training(6, 1), batch)
        assert_as_accurate(gradient(config, small_training(size, count), batch), plain, reference(config, batch))
        parts, metrics = run(config, small_training(size, count), batch)
        for name, value in exact.items():
            assert_as_accurate(metrics[name], whole_metrics[name], value)
        moments = tree_map(lambda g: 0.1 * g, grads)
        assert_as_accurate(parts.optimizer.exp_avg, whole.optimizer.exp_avg, moments)


def test_metrics_are_scalars_under_their_names():
    config = small_config()
    batch = random_batch(config, 4, 9)
    _, metrics = run(config, small_training(), batch)
    assert metrics.keys() >= METRICS
    assert all(value.shape == () for value in metrics.values())
    torch.testing.assert_close(metrics["loss"], fn.loss(fn.init(config), batch, config))
    assert metrics["lr"].item() == pytest.approx(0.005)
    res = torch.stack(fn.backbone(fn.init(config), batch.tokens, config).res)
    torch.testing.assert_close(metrics["mhc/amax_pre"], res[0::2].amax())
    torch.testing.assert_close(metrics["mhc/amax_post"], res[1::2].amax())
    torch.testing.assert_close(metrics["mhc/gain_backward"], fn.composite_gain(res)[1].amax())
    torch.testing.assert_close(metrics["mhc/column_error"], fn.stochasticity_error(res)[1].amax())


@pytest.mark.parametrize("preset", ["paper", "single_pass", "hc"])
def test_metrics_by_layer_are_those_of_the_reference(preset):
    config = small_config(num_layers=3, mhc_preset=preset, mhc_sinkhorn_iters=2)
    batch = random_batch(config, 4, 9)
    params = perturbed(fn.init(config, seed=0))
    state = init_train_state(config, small_training(), device="cpu")._replace(params=params)
    _, metrics = make_train_step(config, small_training())(state, batch)

    def expected(params, layer):
        first = params._replace(layers=params.layers[: layer + 1])
        streams = fn.backbone(first, batch.tokens, config).hidden.x
        res = torch.stack(fn.backbone(params, batch.tokens, config).res)
        own = res[2 * layer : 2 * layer + 2]
        return {
            "amax": own.abs().amax(),
            "gain_forward": fn.composite_gain(res[: 2 * layer + 2])[0].amax(),
            "gain_backward": fn.composite_gain(res[2 * layer :])[1].amax(),
            "row_error": (own.sum(-1) - 1).abs().amax(),
            "column_error": (own.sum(-2) - 1).abs().amax(),
            "dominance": fn.stream_dominance(streams).amax(),
        }

    for layer in range(3):
        plain, exact = expected(params, layer), expected(double(params), layer)
        actual = {name: metrics[f"mhc/{name}/layer_{layer}"] for name in exact}
        assert_as_accurate(actual, plain, exact, floor=1.0)  # errors are differences from 1
    assert metrics["mhc/dominance"] == max(metrics[f"mhc/dominance/layer_{layer}"] for layer in range(3))
    assert 0.25 < metrics["mhc/dominance"] < 1


def test_without_mhc_the_gains_are_those_of_the_identity():
    config = small_config(mhc_enabled=False)
    _, metrics = run(config, small_training(), random_batch(config, 4, 9))
    assert {metrics[name].item() for name in METRICS if name.startswith("mhc/")} == {1.0}


def test_steps_lower_the_loss_and_count():
    config = small_config()
    batch = random_batch(config, 4, 9)
    _, first = run(config, small_training(), batch)
    state, last = run(config, small_training(), batch, steps=8)
    assert last["loss"] < first["loss"] - 0.1
    assert state.step == 8
    assert state.optimizer.step == 8


def test_clipping_uses_the_global_norm():
    config, batch = small_config(), random_batch(small_config(), 4, 9)
    _, metrics = run(config, small_training(max_grad_norm=1e-3), batch)
    state, _ = run(config, small_training(max_grad_norm=1e-3), batch)
    assert metrics["grad_norm"] > 1e-2
    torch.testing.assert_close(fn.global_norm(state.optimizer.exp_avg), torch.tensor(0.1 * 1e-3))


def test_a_step_is_pure_unless_it_donates():
    config, batch = small_config(), random_batch(small_config(), 4, 9)
    state = init_train_state(config, small_training(), device="cpu")
    before = tree_map(torch.clone, state)
    pure, _ = make_train_step(config, small_training())(state, batch)
    assert_trees_close(state, before, 0.0)
    donated, _ = make_train_step(config, small_training(), donate=True)(state, batch)
    assert_trees_close(donated, pure, 0.0)
    assert donated.params.norm.weight is state.params.norm.weight


def test_reduce_sees_every_gradient_and_its_result_counts():
    class Handle:
        def __init__(self, vector):
            self.vector = vector

        def wait(self):
            return 2 * self.vector

    config, batch = small_config(), random_batch(small_config(), 4, 9)
    _, alone = run(config, small_training(), batch)
    sizes = [g.numel() for g in gradient(config, small_training(), batch)]
    assert len(sizes) == config.num_layers + 1
    assert sum(sizes) == fn.count(config)
    # Twice the loss and the gradient over twice the targets.
    _, doubled = run(config, small_training(), batch, reduce=Handle)
    torch.testing.assert_close(doubled["grad_norm"], alone["grad_norm"])
    torch.testing.assert_close(doubled["loss"], alone["loss"])
    without_count = iter([lambda g: g])
    _, twice = run(config, small_training(), batch, reduce=lambda g: next(without_count, Handle)(g))
    torch.testing.assert_close(twice["grad_norm"], 2 * alone["grad_norm"])
    torch.testing.assert_close(twice["loss"], 2 * alone["loss"])


def test_bf16_keeps_fp32_weights_and_stays_near_fp32():
    config, batch = small_config(), random_batch(small_config(), 4, 9)
    exact, exact_metrics = run(config, small_training(), batch, steps=3)
    state, metrics = run(config, small_training(mixed_precision="bf16"), batch, steps=3)
    assert {leaf.dtype for leaf in tree_leaves(state.params)} == {torch.float32}
    torch.testing.assert_close(metrics["loss"], exact_metrics["loss"], rtol=1e-2, atol=0)
    assert not torch.equal(state.params.embed_tokens.weight, exact.params.embed_tokens.weight)


def test_a_batch_of_another_size_is_refused():
    config = small_config()
    with pytest.raises(ValueError, match="2 × 2 = 4"):
        run(config, small_training(), random_batch(config, 3, 9))


@pytest.mark.parametrize("remat", ["mhc", "full"])
def test_every_policy_gives_the_gradient_of_keeping_all(remat):
    config = small_config(num_layers=5)
    batch = random_batch(config, 4, 9, ignored=0.3)
    assert checkpoint_interval(config, "mhc") == 2  # so that mhc rebuilds the streams of layers 1 and 3
    plain = gradient(config, small_training(), batch)
    assert_as_accurate(gradient(config, small_training(remat=remat), batch), plain, reference(config, batch))


def test_gradient_checkpointing_means_full_and_contradictions_are_refused():
    assert small_training(gradient_checkpointing=True).remat_policy(small_config()) == "full"
    with pytest.raises(ValueError, match="leave one out"):
        small_training(gradient_checkpointing=True, remat="mhc")
    with pytest.raises(ValueError, match="the model has none"):
        make_train_step(small_config(mhc_enabled=False), small_training(remat="mhc"))


def test_fp16_scales_the_loss_and_stays_near_fp32():
    config, batch = small_config(), random_batch(small_config(), 4, 9)
    _, exact = run(config, small_training(), batch, steps=3)
    state, metrics = run(config, small_training(mixed_precision="fp16"), batch, steps=3)
    assert {leaf.dtype for leaf in tree_leaves(state.params)} == {torch.float32}
    torch.testing.assert_close(metrics["loss"], exact["loss"], rtol=2e-3, atol=0)
    torch.testing.assert_close(metrics["grad_norm"], exact["grad_norm"], rtol=1e-2, atol=0)
    assert metrics["loss_scale"] == 2**16
    assert metrics["skipped"] == 0
    assert state.loss_scale.good_steps == 3
    assert state.optimizer.step == 3


def test_fp16_skips_a_step_that_overflows_and_halves_the_scale():
    config, batch = small_config(), random_batch(small_config(), 4, 9)
    train_config = small_training(mixed_precision="fp16")
    state = init_train_state(config, train_config, device="cpu")
    huge = state._replace(loss_scale=LossScale(torch.tensor(2.0**40), torch.tensor(7)))
    step = make_train_step(config, train_config)
    after, metrics = step(huge, batch)
    assert metrics["skipped"] == 1
    assert not metrics["grad_norm"].isfinite()
    assert_trees_close((after.params, after.optimizer), (huge.params, huge.optimizer), 0.0)
    assert after.loss_scale == (2.0**39, 0)
    assert after.step == 1
    for _ in range(40):
        after, metrics = step(after, batch)
    assert metrics["skipped"] == 0
    assert not torch.equal(after.params.embed_tokens.weight, state.params.embed_tokens.weight)


def test_a_state_of_another_precision_is_refused():
    config, batch = small_config(), random_batch(small_config(), 4, 9)
    for made, used in (("bf16", "fp16"), ("fp16", "bf16")):
        state = init_train_state(config, small_training(mixed_precision=made), device="cpu")
        with pytest.raises(ValueError, match="loss scale"):
            make_train_step(config, small_training(mixed_precision=used))(state, batch)


def test_the_head_in_chunks_with_a_padded_last_one_changes_nothing(monkeypatch):
    config = small_config()
    batch = random_batch(config, 4, 9, ignored=0.3)
    whole = gradient(config, small_training(), batch)
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", 5 * config.vocab_size)
    assert chunk_tokens(18, config.vocab_size, "cpu") == 5  # four chunks, two tokens missing in the last
    assert_as_accurate(gradient(config, small_training(), batch), whole, reference(config, batch))


def test_a_token_that_occurs_often_has_an_exact_gradient_in_bf16():
    config = small_config(tie_embeddings=False, num_layers=1)
    tokens = torch.full((4, 64), 7)
    batch = fn.Batch(tokens, random_batch(config, 4, 64).targets)
    exact = torch.func.grad(fn.loss)(fn.init(config), batch, config).embed_tokens.weight[7]
    rest = gradient(config, small_training(mixed_precision="bf16"), batch)[0]
    ours = rest[: config.vocab_size * config.hidden_dim].view(config.vocab_size, config.hidden_dim)[7]
    assert (ours - exact).abs().max() < 0.05 * exact.abs().max()


def test_the_loss_scale_grows_after_many_good_steps():
    scale = LossScale(torch.tensor(4.0), torch.tensor(1999))
    assert next_loss_scale(scale, torch.tensor(0.0)) == (8.0, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("mhc", "remat", "precision"),
    [(True, "none", "fp32"), (False, "none", "fp32"), (True, "mhc", "fp32"), (True, "full", "bf16")],
)
def test_the_compiled_step_has_the_gradients_of_the_loss(mhc, remat, precision):
    config = small_config(num_layers=5, mhc_enabled=mhc, mhc_sinkhorn_iters=3)
    batch = random_batch(config, 4, 9, ignored=0.3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    seen, said = [], []
    train_config = small_training(compile=True, remat=remat, mixed_precision=precision)
    state = init_train_state(config, train_config, device="cpu")
    step = make_train_step(
        config, train_config, reduce=lambda g: seen.append(g.clone()) or g, on_compile=lambda *what: said.append(what)
    )
    for _ in range(3):
        state, _ = step(state, batch)
    functions = 5 if remat == "mhc" else 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == functions
    assert [number for number, _, _ in said] == list(range(1, functions + 1))
    assert {of for _, of, _ in said} == {functions}

    *layers, rest = seen[1 : config.num_layers + 2]
    plain = reference(config, batch, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    assert_as_accurate([rest, *reversed(layers)], plain, reference(config, batch))


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
def test_another_length_is_compiled_anew_and_correct():
    config = small_config(num_layers=1, mhc_enabled=False)
    step = make_train_step(config, small_training(compile=True))
    for length in (4, 9, 4):
        batch = random_batch(config, 4, length)
        state = init_train_state(config, small_training(), device="cpu")
        _, metrics = step(state, batch)
        torch.testing.assert_close(metrics["loss"], fn.loss(state.params, batch, config))


@pytest.mark.gpu
def test_gpu_step_equals_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config, batch = small_config(), random_batch(small_config(), 4, 9)
    _, expected = run(config, small_training(), batch)
    state = init_train_state(config, small_training(), device="cuda")
    _, metrics = make_train_step(config, small_training())(state, fn.Batch(*(x.cuda() for x in batch)))
    assert_trees_close({k: v.cpu() for k, v in metrics.items()}, expected, 1e-4)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LARGER = dict(hidden_dim=128, num_layers=3, num_heads=4, num_kv_heads=2, ffn_dim=256, vocab_size=500, max_seq_len=128)


@pytest.mark.gpu
@GPU
@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("remat", ["none", "mhc", "full"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.1), ("fp16", 0.05)])
def test_gpu_compiled_gradients_equal_the_reference_in_float64(precision, tolerance, remat):
    config = small_config(**LARGER)
    batch = random_batch(config, 4, 128, ignored=0.3)
    exact = torch.func.grad(fn.loss)(fn.init(config, dtype=torch.float64), batch, config)
    groups = [*reversed(exact.layers), exact._replace(layers=())]
    expected = [torch.cat([leaf.flatten() for leaf in tree_leaves(group)]) for group in groups]
    train_config = small_training(compile=True, mixed_precision=precision, remat=remat)
    state, seen = init_train_state(config, train_config, device="cuda"), []
    step = make_train_step(config, train_config, reduce=lambda g: seen.append(g.clone()) or g)
    _, metrics = step(state, fn.Batch(*(x.cuda() for x in batch)))
    scale = metrics.get("loss_scale", torch.tensor(1.0)).item()
    actual = [vector.cpu() / scale for vector in seen[1 : 1 + len(expected)]]
    assert_trees_close(actual, expected, tolerance)


@pytest.mark.gpu
@GPU
@pytest.mark.usefixtures("no_shape_checks")
def test_gpu_steps_are_the_same_bit_for_bit_where_pytorch_is_asked_for_it(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    config = small_config(**(LARGER | {"max_seq_len": 1024}))
    train_config = small_training(compile=True, mixed_precision="bf16")
    batch = fn.Batch(*(x.cuda() for x in random_batch(config, 4, 1024)))
    torch.use_deterministic_algorithms(True)
    try:
        step = make_train_step(config, train_config)
        runs = [step(init_train_state(config, train_config, device="cuda"), batch)[0] for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert_trees_close(run.params, runs[0].params, 0.0)
