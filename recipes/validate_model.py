"""Seven quick checks: `python recipes/validate_model.py [model=…] [checkpoint=DIR]`; exit code 1 if one fails."""

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable

import torch

from rlm_mhc import ModelConfig, TrainConfig, fn, load_pretrained, save_pretrained
from rlm_mhc.params import matrix_dtype, with_one_matrix_dtype
from rlm_mhc.program.state import resume_train_state
from rlm_mhc.program.step import make_train_step
from rlm_mhc.testing import TOLERANCE, largest_difference
from rlm_mhc.train import command, pick_device
from rlm_mhc.tree import named_leaves, tree_map
from rlm_mhc.validation import at_least, check, location, one_of, section

SEQUENCES, LENGTH = 2, 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """What to check: a checkpoint, or a fresh model of a config."""

    model: ModelConfig = section(ModelConfig)
    checkpoint: str | None = location(None)
    device: str = one_of("auto", "cpu", "cuda")
    seed: int = at_least(0, 42)
    debug: bool = False

    def __post_init__(self) -> None:
        check(self)
        if self.checkpoint and self.model != ModelConfig.preset("tiny"):
            raise ValueError(f"checkpoint={self.checkpoint}: it has a model of its own; leave model out")


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model under test and a batch for it."""

    params: fn.LMParams
    config: ModelConfig
    batch: fn.Batch
    seed: int


def forward(model: Subject) -> str:
    """Logits are finite and of the right shape, and the loss of a fresh model is near that of guessing."""
    logits = fn.forward(model.params, model.batch.tokens, model.config)
    require(logits.shape == (*model.batch.tokens.shape, model.config.vocab_size), f"shape {tuple(logits.shape)}")
    require(bool(logits.isfinite().all()), "logits are not finite")
    loss = fn.token_loss_sum(logits, model.batch.targets) / model.batch.targets.numel()
    return f"logits {tuple(logits.shape)}, loss {loss.item():.3f}, guessing {math.log(model.config.vocab_size):.3f}"


def backward(model: Subject) -> str:
    """Every weight receives a finite gradient that is not zero."""
    grads = named_leaves(torch.func.grad(fn.loss)(model.params, model.batch, model.config))
    broken = [name for name, g in grads.items() if not g.isfinite().all()]
    dead = [name for name, g in grads.items() if not g.any()]
    require(not broken, f"not finite: {', '.join(broken[:3])}")
    require(not dead, f"zero: {', '.join(dead[:3])}")
    return f"{len(grads)} gradients, global norm {fn.global_norm(grads).item():.3f}"


def five_steps(model: Subject) -> str:
    """Five updates on one batch lower its loss."""
    losses = losses_of_five_steps(model, "fp32")
    require(losses[-1] < losses[0], f"loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
    return f"loss {losses[0]:.3f} to {losses[-1]:.3f}"


def save_and_load(model: Subject) -> str:
    """A checkpoint reads back bit-equal."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, model.params, model.config)
        loaded, config = load_pretrained(folder, device=model.batch.tokens.device)
    require(config == model.config, "another config came back")
    ours, theirs = named_leaves(model.params), named_leaves(loaded)
    wrong = [name for name, leaf in ours.items() if not torch.equal(leaf, theirs[name])]
    require(not wrong, f"changed: {', '.join(wrong[:3])}")
    return f"{len(ours)} tensors bit-equal"


def hyper_connections(model: Subject) -> str:
    """Residual mappings are doubly stochastic: rows to rounding, columns as far as the iteration got."""
    if not model.config.mhc_enabled:
        return "mHC is off: plain residuals"
    res = torch.stack(fn.backbone(model.params, model.batch.tokens, model.config).res)
    rows, columns = (error.max().item() for error in fn.stochasticity_error(res))
    gain_forward, gain_backward = (gain.max().item() for gain in fn.composite_gain(res))
    if model.config.mhc_preset == "hc":
        return f"unconstrained: gain {gain_forward:.3f} forward, {gain_backward:.3f} backward"
    require(rows < 1e-5, f"row sums are off by {rows:.1e}")
    require(bool((res >= 0).all()), "negative entries")
    require(columns < 0.1, f"column sums are off by {columns:.1e}; raise mhc_sinkhorn_iters")
    return (
        f"row error {rows:.0e}, column error {columns:.0e}, largest entry {res.max().item():.3f}, "
        f"gain {gain_forward:.3f} forward, {gain_backward:.3f} backward"
    )


def mixed_precision(model: Subject) -> str:
    """Five bf16 updates lower the loss, on fp32 weights."""
    losses = losses_of_five_steps(model, "bf16")
    require(all(map(math.isfinite, losses)), f"losses {losses}")
    require(losses[-1] < losses[0], f"loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
    return f"bf16: loss {losses[0]:.3f} to {losses[-1]:.3f}"


def sampling(model: Subject) -> str:
    """Tokens drawn one by one with a cache: valid, the same for the same seed; its logits those of a full forward."""
    first, second = draw(model), draw(model)
    require(first == second, f"one seed gave {first} and {second}")
    require(all(0 <= token < model.config.vocab_size for token in first), f"invalid tokens {first}")
    error = decoding_error(model)
    allowed = 10 * TOLERANCE[matrix_dtype(named_leaves(model.params), model.config)]
    require(error < allowed, f"logits with a cache differ from those of a full forward by {error:.0e} of their largest")
    return f"{len(first)} tokens: {', '.join(map(str, first[:6]))} …"


def losses_of_five_steps(model: Subject, precision: str) -> list[float]:
    """Loss before each of five updates and after the last."""
    training = TrainConfig(
        batch_size=SEQUENCES,
        gradient_accumulation_steps=1,
        max_steps=6,
        mixed_precision=precision,
        compile=False,
        optimizer={"lr": 1e-3},  # type: ignore[arg-type]
        scheduler={"warmup_steps": 0},  # type: ignore[arg-type]
    )
    params = tree_map(lambda leaf: leaf.to(torch.float32, copy=True), model.params)
    state = resume_train_state(params, fn.adamw_init(params), 0)
    step, losses = make_train_step(model.config, training, donate=True), []
    for _ in range(6):
        state, metrics = step(state, model.batch)
        losses.append(metrics["loss"].item())
    return losses


def draw(model: Subject) -> list[int]:
    """Eight tokens after the first of the batch."""
    first, config = model.batch.tokens[:1, :1], model.config
    generator = torch.Generator(first.device).manual_seed(model.seed)
    new = min(8, config.max_seq_len - 1)
    drawn = fn.generate(model.params, first, config, max_new_tokens=new, temperature=1.0, generator=generator)
    return drawn.tokens[0, 1:].tolist()


def decoding_error(model: Subject) -> float:
    """How far the logits of a last token read by `fn.decode_step` are from those of `fn.forward`."""
    tokens, config = model.batch.tokens, model.config
    if tokens.shape[1] < 2:
        return 0.0
    dtype = matrix_dtype(named_leaves(model.params), config)
    cache = fn.init_cache(config, len(tokens), tokens.shape[1], dtype=dtype, device=tokens.device)
    _, cache = fn.prefill(model.params, tokens[:, :-1], config, cache)
    logits, _ = fn.decode_step(model.params, tokens[:, -1], config, cache)
    return largest_difference(logits, fn.forward(model.params, tokens, config)[:, -1])


def require(holds: bool, otherwise: str) -> None:
    """Fail the running check with a reason."""
    if not holds:
        raise AssertionError(otherwise)


CHECKS: dict[str, Callable[[Subject], str]] = {
    "forward": forward,
    "backward": backward,
    "five steps lower the loss": five_steps,
    "save and load": save_and_load,
    "mHC": hyper_connections,
    "mixed precision": mixed_precision,
    "sampling": sampling,
}


def subject(run: ValidateConfig) -> Subject:
    """The model to check and a random batch."""
    device = pick_device(run.device)
    if run.checkpoint:
        params, config = load_pretrained(run.checkpoint, device=device)
        params = with_one_matrix_dtype(params, config)
    else:
        config = run.model
        params = fn.init(config, seed=run.seed, device=device)
    generator = torch.Generator().manual_seed(run.seed)
    length = min(LENGTH, config.max_seq_len)
    tokens = torch.randint(
        config.vocab_size, (SEQUENCES, length + 1), generator=generator, dtype=torch.int64, device="cpu"
    ).to(device)
    return Subject(params, config, fn.Batch(tokens[:, :-1], tokens[:, 1:]), run.seed)


def main(run: ValidateConfig) -> int:
    """Run every check and print a table; 1 if one failed."""
    model = subject(run)
    print(f"{run.checkpoint or 'a fresh model'}: {fn.count(model.config):,} parameters")
    print(f"{'check':<28}{'result':<8}{'seconds':>8}  detail")
    failed = 0
    for name, run_check in CHECKS.items():
        start = time.perf_counter()
        try:
            result, detail = "ok", run_check(model)
        except (AssertionError, ValueError, RuntimeError) as error:
            result, detail, failed = "FAILED", " ".join(str(error).split()), failed + 1
        print(f"{name:<28}{result:<8}{time.perf_counter() - start:>8.2f}  {detail}", flush=True)
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    command(ValidateConfig, __file__, main)
