"""What torch's defaults are around a call changes nothing: the same bits, dtypes and devices under any default dtype
and inside `with torch.device("meta")`."""

import contextlib
import functools

import pytest
import torch

from rlm_mhc import TrainConfig, fn, load_pretrained, save_pretrained
from rlm_mhc.config import LoraConfig
from rlm_mhc.convert import from_llama, to_llama
from rlm_mhc.program import init_train_state, make_decoder, make_train_step
from rlm_mhc.program.memory import count_activations
from rlm_mhc.program.precision import init_loss_scale, next_loss_scale
from rlm_mhc.program.state import resume_train_state
from rlm_mhc.program.weight_source import lora_source
from rlm_mhc.testing import random_batch, small_config
from rlm_mhc.tree import named_leaves
from rlm_mhc.variants import PRESETS, PROJECTIONS

CONFIG = small_config(mhc_sinkhorn_iters=3)
LENGTHS = torch.tensor([3, 1])
PROMPTS = torch.tensor([[1, 2, 3], [4, 0, 0]])


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AMBIENT = {
    "float64": functools.partial(default_dtype, torch.float64),
    "bfloat16": functools.partial(default_dtype, torch.bfloat16),
    "float16": functools.partial(default_dtype, torch.float16),
    "meta": functools.partial(torch.device, "meta"),
}


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")


def initial():
    configs = [small_config(mhc_preset=name) for name in PRESETS]
    return [fn.init(config, seed=3, dtype=dtype) for config in configs for dtype in (torch.float32, torch.bfloat16)]


def projected():
    sizes = {name: 4 if rule.fits(4) else 2 for name, rule in PROJECTIONS.items()}
    return {name: fn.project(normal(5, PROJECTIONS[name].raw_size(n)), n, name) for name, n in sizes.items()}


def sinkhorns():
    logits = normal(3, 4, 4)
    pull = [torch.func.vjp(f, logits)[1](logits) for f in (fn.sinkhorn_knopp, fn.sinkhorn_implicit)]
    tangents = torch.func.jvp(fn.sinkhorn_knopp, (logits,), (logits,))
    res = fn.sinkhorn_knopp(logits.expand(2, 3, 4, 4))
    return pull, tangents, fn.composite_gain(res), fn.cumulative_gain(res), fn.stochasticity_error(res)


def gradients():
    batch = random_batch(CONFIG, 2, 7, ignored=0.2)
    return torch.func.grad_and_value(fn.loss)(fn.init(CONFIG), batch, CONFIG), random_batch(CONFIG, 2, 7)


def schedules():
    steps = (3, torch.tensor(3, dtype=torch.int64, device="cpu"))
    return [fn.cosine_schedule(step, lr=0.1, warmup_steps=2, max_steps=9) for step in steps]


def generated(**how):
    params, device = fn.init(CONFIG), "cpu"
    generator = torch.Generator(device).manual_seed(0)
    how = dict(lengths=LENGTHS, max_new_tokens=4, stop_tokens=[60], generator=generator, **how)
    return fn.generate(params, PROMPTS, CONFIG, **how)


def sampled():
    how = dict(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    return generated(**how), generated(decoder=make_decoder(CONFIG, compiled=False))


def trained(precision, preset="paper"):
    config = CONFIG.replace(mhc_preset=preset)
    training = TrainConfig(batch_size=1, gradient_accumulation_steps=2, mixed_precision=precision, compile=False)
    state, step = init_train_state(config, training, device="cpu"), make_train_step(config, training)
    for _ in range(2):
        state, metrics = step(state, random_batch(config, 2, 7))
    assert metrics["skipped"] == 0
    return state, metrics


def adapted():
    lora = LoraConfig(rank=2)
    training = TrainConfig(batch_size=2, gradient_accumulation_steps=1, mixed_precision="bf16", compile=False)
    base = fn.cast(fn.init(CONFIG), CONFIG, torch.bfloat16)
    begun = fn.lora_init(base, lora, seed=1)
    step = make_train_step(CONFIG, training, weight_source=lora_source(base, begun, lora))
    state, metrics = step(resume_train_state(begun, fn.adamw_init(begun), 0), random_batch(CONFIG, 2, 7))
    return begun, state, metrics, fn.lora_merge(base, state.params, lora.scale)


def scales():
    scale = init_loss_scale("fp16", "cpu")
    return scale, next_loss_scale(scale, torch.tensor(1.0, dtype=torch.float32, device="cpu"))


def counted():
    sizes = count_activations(CONFIG, 1, 16, torch.float16, "none", "cpu")
    return [torch.tensor(size, dtype=torch.int64, device="cpu") for size in sizes]


def on_disk(tmp_path):
    save_pretrained(tmp_path / "saved", fn.init(CONFIG), CONFIG)
    plain = CONFIG.replace(mhc_enabled=False)
    to_llama(fn.init(plain), tmp_path / f"llama{len(list(tmp_path.iterdir()))}", config=plain)
    folder = sorted(tmp_path.glob("llama*"))[-1]
    return load_pretrained(tmp_path / "saved")[0], from_llama(folder, mhc_flows=2)[0]


CASES = {
    "init": initial,
    "projections": projected,
    "sinkhorn": sinkhorns,
    "gradients": gradients,
    "schedule": schedules,
    "generation": sampled,
    "step in fp32": functools.partial(trained, "fp32"),
    "step in fp16": functools.partial(trained, "fp16"),
    "step in bf16": functools.partial(trained, "bf16", "single_pass"),
    "LoRA": adapted,
    "loss scale": scales,
    "plan": counted,
    "files": on_disk,
}


@pytest.mark.parametrize("case", CASES)
def test_no_default_of_torch_changes_a_result(case, tmp_path):
    run = functools.partial(on_disk, tmp_path) if case == "files" else CASES[case]
    expected = named_leaves(run())
    for ambient in AMBIENT.values():
        with ambient():
            actual = named_leaves(run())
        assert actual.keys() == expected.keys()
        for name, leaf in expected.items():
            found = actual[name]
            assert (found.dtype, found.device) == (leaf.dtype, leaf.device), name
            assert torch.equal(found, leaf), name
