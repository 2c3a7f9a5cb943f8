"""The fused mixing against `fn` in float64: on a CPU in Triton's interpreter, with `-m gpu` compiled."""

import pytest
import torch

from rlm_mhc import fn
from rlm_mhc.fn.layout import aligned
from rlm_mhc.kernels import selftest
from rlm_mhc.kernels.mix_pre import Settings, Weights, mix_pre, mix_pre_backward, tiling
from rlm_mhc.kernels.selftest import ARGUMENTS, OUTPUTS, draw_inputs, fused, reference
from rlm_mhc.testing import assert_as_accurate, small_config
from rlm_mhc.testing.models import double
from rlm_mhc.variants import PRESETS

PLAIN, SHIFTED = Settings(3, 1e-6, 0.0), Settings(3, 1e-6, 1e-6)
ALL = pytest.mark.parametrize("name", ARGUMENTS)
# What ops that round no streams compute in fp32 from streams of any dtype.
WIDE = {"pre", "post", "res"} | {f"gradient of {key}" for key in ("post", "res", "given", "phi", "alpha", "bias")}


def results(name, run, inputs, cotangents):
    """Outputs of an op and the gradient of each argument, by name."""
    outputs, pull = torch.func.vjp(run, *inputs.values())
    gradients = pull(tuple(g.to(y) for g, y in zip(cotangents, outputs, strict=True)))
    keys = (*OUTPUTS[name], *(f"gradient of {key}" for key in inputs))
    return dict(zip(keys, (*outputs, *gradients), strict=True))


def check(name, inputs, settings=PLAIN):
    """Check that outputs and gradients are as accurate as those of the reference in their dtype."""
    plain = reference(name, settings, inputs["streams"].dtype)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator).to(y) for y in plain(*inputs.values())]
    actual = results(name, fused(name, settings), inputs, cotangents)
    exact = results(name, plain, double(inputs), cotangents)
    wide = actual.keys() & (WIDE if name in ("mix_post", "mix_pre", "single_pass_pre") else set())
    for keys, given in ((wide, {key: x.float() for key, x in inputs.items()}), (actual.keys() - wide, inputs)):
        trees = (actual, results(name, plain, given, cotangents), exact)
        assert_as_accurate(*({key: tree[key] for key in sorted(keys)} for tree in trees))


@ALL
@pytest.mark.parametrize(
    ("n", "c", "tokens", "dtype"),
    [
        (3, 80, 63, torch.float32),
        (5, 48, 63, torch.bfloat16),
        (3, 48, 1, torch.float16),
        (4, 80, 1000, torch.bfloat16),
        (1, 16, 63, torch.float32),
        (9, 48, 7, torch.float32),
        (3, 272, 9, torch.float32),
    ],
)
def test_outputs_and_every_gradient(name, n, c, tokens, dtype, device):
    settings = SHIFTED if n in (4, 5) else PLAIN
    check(name, draw_inputs(name, n, c, tokens, dtype, device), settings)


@pytest.mark.parametrize("n", [2, 8, 12, 16])
def test_any_number_of_streams(n, device):
    check("mix_post_pre", draw_inputs("mix_post_pre", n, 32, 5, torch.float32, device))


@pytest.mark.parametrize("settings", [Settings(1, 1e-6, 0.0), Settings(20, 1e-5, 0.0), Settings(20, 1e-6, 1e-6)])
def test_any_number_of_iterations(settings, device):
    check("mix_pre", draw_inputs("mix_pre", 4, 48, 9, torch.float32, device), settings)


@pytest.mark.parametrize("n", [4, 5])
@pytest.mark.parametrize("name", ["mix_pre", "sub_layer"])
def test_programs_that_take_turns_with_many_tokens(name, n, device, monkeypatch):
    from rlm_mhc.kernels.mix_pre import triton_backward

    monkeypatch.setattr(tiling, "PROGRAMS", 8)
    monkeypatch.setattr(triton_backward, "NORM_PROGRAMS", 3)
    monkeypatch.setattr(triton_backward, "MAPPING_PROGRAMS", 3)
    check(name, draw_inputs(name, n, 80, 1000, torch.float32, device))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [4, 5])
def test_gpu_tens_of_thousands_of_tokens(n):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check("sub_layer", draw_inputs("sub_layer", n, 80, 40000, torch.bfloat16, "cuda"))


@pytest.mark.parametrize("settings", [Settings(3, 1e-2, 0.0), Settings(3, 1e-2, 1e-2)])
def test_what_is_added_to_squares_and_sums(settings, device, monkeypatch):
    preset = "deepseek_v4" if settings.sinkhorn_eps else "paper"
    monkeypatch.setitem(PRESETS, preset, PRESETS[preset]._replace(eps=settings.sinkhorn_eps))
    inputs = draw_inputs("mix_pre", 4, 48, 40, torch.float32, device)
    inputs["streams"] *= torch.logspace(-3, 0, 40, device=device)[:, None, None]
    inputs["streams"][::7] = 0
    check("mix_pre", inputs, settings)


@pytest.fixture
def nan_filled():
    """Every tensor that is made without values holds NaN."""
    # On some versions a product on CUDA is an error in this mode, for what its library does unless told otherwise.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@ALL
@pytest.mark.usefixtures("nan_filled")
def test_nothing_is_read_before_it_is_written_and_nothing_is_left_out(name, device):
    check(name, draw_inputs(name, 3, 48, 33, torch.float32, device))


@ALL
def test_inputs_of_any_strides_and_batch_axes(name, device):
    inputs = draw_inputs(name, 3, 48, 12, torch.float32, device)
    expected = fused(name, PLAIN)(*inputs.values())

    def spread(x):  # the same numbers, every second one of a larger tensor
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)
        wide[..., ::2] = x
        return wide[..., ::2]

    per_token = {"streams", "output", "post", "res", "given"}
    loose = [spread(x.unflatten(0, (3, 4)) if key in per_token else x) for key, x in inputs.items()]
    assert not any(x.is_contiguous() for x in loose)
    for actual, wanted in zip(fused(name, PLAIN)(*loose), expected, strict=True):
        assert actual.shape[:2] == (3, 4)
        torch.testing.assert_close(actual.flatten(0, 1), wanted, rtol=0, atol=0)
    gradients = [torch.func.grad(lambda *x: fused(name, PLAIN)(*x)[0].sum())(*x) for x in (loose, inputs.values())]
    torch.testing.assert_close(gradients[0].flatten(0, 1), gradients[1], rtol=0, atol=0)


def test_what_begins_off_16_bytes_is_copied():
    buffer = torch.arange(9.0)
    assert aligned(buffer) is buffer
    off = aligned(buffer[1:])
    assert off.data_ptr() % 16 == 0
    assert torch.equal(off, buffer[1:])


@pytest.mark.parametrize("size", [60.0, 1e3, 3e4])
@pytest.mark.parametrize("settings", [Settings(20, 1e-6, 0.0), Settings(20, 1e-6, 1e-6)])
def test_extreme_logits_are_finite_and_right(size, settings, device):
    inputs = draw_inputs("mix_pre", 4, 48, 40, torch.float32, device)
    n = 4
    # Few bits each, so that the logits are the same numbers in fp32 and in float64.
    inputs["bias"][2 * n :] = (inputs["bias"][2 * n :] * 8).round() / 16 * size
    inputs["phi"][:, 2 * n :] = 0
    check("mix_pre", inputs, settings)


@pytest.mark.usefixtures("no_shape_checks")
def test_a_compiled_backward_is_finite_for_extreme_logits(device):
    inputs = draw_inputs("mix_pre", 4, 48, 40, torch.float32, device)
    inputs["bias"] = inputs["bias"].sign() * 60

    def gradients(*values):
        outputs, pull = torch.func.vjp(fused("mix_pre", Settings(20, 1e-6, 0.0)), *values)
        return pull(tuple(torch.ones_like(x) for x in outputs))

    compiled = torch.compile(gradients, fullgraph=True)(*inputs.values())
    for actual, expected in zip(compiled, gradients(*inputs.values()), strict=True):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_gates_are_finite(sign, device):
    inputs = draw_inputs("mix_pre", 4, 48, 7, torch.float32, device)
    inputs["bias"] = inputs["bias"].abs() * sign * 3e4
    outputs, pull = torch.func.vjp(fused("mix_pre", PLAIN), *inputs.values())
    assert all(x.isfinite().all() for x in (*outputs, *pull(tuple(torch.ones_like(x) for x in outputs))))


@ALL
def test_no_tokens(name, device):
    inputs = draw_inputs(name, 3, 48, 0, torch.float32, device)
    outputs, pull = torch.func.vjp(fused(name, PLAIN), *inputs.values())
    assert all(x.shape[0] == 0 for x in outputs)
    gradients = dict(zip(inputs, pull(outputs), strict=True))
    assert all(not g.any() for g in gradients.values())


@ALL
def test_the_same_bits_in_every_run(name, device):
    inputs = draw_inputs(name, 4, 48, 300, torch.bfloat16, device)

    def run():
        outputs, pull = torch.func.vjp(fused(name, PLAIN), *inputs.values())
        return (*outputs, *pull(tuple(torch.ones_like(x) for x in outputs)))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_a_cotangent_of_the_combined_streams_joins_by_the_transpose(device):
    """`mix_pre_backward(more, res)` is that of the combine which comes after, without a pass of its own."""
    for n in (3, 5):
        inputs = draw_inputs("mix_pre", n, 48, 9, torch.float32, device)
        streams, weights = inputs["streams"], Weights(*(inputs[key] for key in Weights._fields))
        kept = mix_pre(streams, weights, PLAIN)
        zero = (torch.zeros_like(kept.normed), None, torch.zeros_like(kept.post), torch.zeros_like(kept.res))
        res, more = torch.randn_like(kept.res), torch.randn_like(streams)
        actual, _ = mix_pre_backward(streams, weights, kept, zero, PLAIN, more=more, res=res)
        torch.testing.assert_close(actual, torch.einsum("tij,tic->tjc", res, more))
        added, _ = mix_pre_backward(streams, weights, kept, zero, PLAIN, more=more)
        torch.testing.assert_close(added, more)


@pytest.mark.parametrize("name", ["mix_post", "mix_post_pre", "single_pass_pre"])
def test_their_own_backward_is_the_one_that_runs(name, gradient_of, device):
    """The ops are opaque, so that a backward dropped by a transform would be zero, and one derived an error."""
    first, *rest = draw_inputs(name, 3, 48, 5, torch.float32, device).values()
    cotangents = [torch.randn_like(x) for x in fused(name, PLAIN)(first, *rest)]

    def loss(run, x):
        return sum((y * g.to(y.dtype)).sum() for y, g in zip(run(x, *rest), cotangents, strict=True))

    exact = torch.func.grad(lambda x: loss(lambda x, *r: reference(name, PLAIN)(x, *(y.double() for y in r)), x))(
        first.double()
    )
    actual = gradient_of(lambda x: loss(fused(name, PLAIN), x), first)
    assert exact.abs().max() > 1e-2
    torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("name", ["mix_pre", "single_pass_pre"])
def test_a_compiled_gradient_of_a_transposed_phi(name, device):
    inputs = draw_inputs(name, 3, 48, 5, torch.float32, device)

    def gradient(turned):
        def loss(phi):
            return sum(y.square().sum() for y in fused(name, PLAIN)(*(inputs | {"phi": phi}).values()))

        return torch.func.grad(loss)(turned.mT) * 2

    turned = inputs["phi"].mT.contiguous()
    torch.testing.assert_close(torch.compile(gradient, fullgraph=True)(turned), gradient(turned))


def test_vmap_of_values_and_of_gradients(device):
    inputs = draw_inputs("mix_pre", 3, 48, 6, torch.float32, device)
    streams, weights = inputs.pop("streams").unflatten(0, (2, 3)), tuple(inputs.values())
    run = fused("mix_pre", PLAIN)
    together, apart = torch.vmap(lambda x: run(x, *weights))(streams), run(streams, *weights)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b)
    per_example = torch.vmap(torch.func.grad(lambda phi, x: run(x, phi, *weights[1:])[0].sum()), in_dims=(None, 0))
    each = [torch.func.grad(lambda phi, x=x: run(x, phi, *weights[1:])[0].sum())(weights[0]) for x in streams]
    torch.testing.assert_close(per_example(weights[0], streams), torch.stack(each))


BAD = {
    "float64": lambda d: d | {"streams": d["streams"].double()},
    "17 streams": lambda d: d | {"streams": d["streams"].repeat(1, 6, 1)[:, :17]},
    "width 24": lambda d: d | {"streams": d["streams"][..., :24]},
    "phi of another size": lambda d: d | {"phi": d["phi"][1:]},
    "phi on another device": lambda d: d | {"phi": d["phi"].to("meta")},
    "bias in bf16": lambda d: d | {"bias": d["bias"].bfloat16()},
    "weight in another half precision": lambda d: d | {"weight": d["weight"].half()},
}


@pytest.mark.parametrize("bad", BAD)
def test_what_would_be_misread_is_refused(bad, device):
    inputs = BAD[bad](draw_inputs("mix_pre", 3, 48, 2, torch.float32, device))
    with pytest.raises(ValueError, match=r"take|expected"):
        fused("mix_pre", PLAIN)(*inputs.values())


@pytest.mark.parametrize("settings", [Settings(0, 1e-6, 0.0), Settings(65, 1e-6, 0.0), Settings(3, -1.0, 0.0)])
def test_settings_that_are_not_there_are_refused(settings, device):
    x, *weights = draw_inputs("mix_pre", 3, 48, 2, torch.float32, device).values()
    with pytest.raises(ValueError, match=r"take|expected"):
        mix_pre(x, Weights(*weights), settings)


def test_the_self_test_passes_and_names_what_fails(device, monkeypatch):
    assert selftest.self_test(device, torch.float32, PLAIN) is None
    right = fn.rms_norm
    monkeypatch.setattr(selftest, "rms_norm", lambda u, w, eps: right(u, w, eps) * 1.001)
    assert selftest.self_test(device, torch.float32, PLAIN).startswith("mix_pre: ")


@pytest.mark.parametrize("preset", ["paper", "single_pass"])
def test_the_self_test_passes_with_a_single_stream(preset, device):
    model = small_config(mhc_flows=1, mhc_preset=preset)
    assert selftest.self_test(device, torch.float32, PLAIN, model) is None
