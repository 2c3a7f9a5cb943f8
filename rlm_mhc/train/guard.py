"""A watch over the numbers of every step: those that are not finite, and losses that leap."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from rlm_mhc.fn import Batch, LMParams
from rlm_mhc.program.precision import SMALLEST_SCALE
from rlm_mhc.train.diagnose import first_nonfinite
from rlm_mhc.train.run_config import RunConfig
from rlm_mhc.train.trainable import FULL

RECENT_LOSSES = 64
LOSSES_BEFORE_SPIKES = 16


class BadStep(NamedTuple):
    """A step that was skipped: its number, its batch, and what it computed by the names of the metrics."""

    number: int
    batch: Batch
    values: dict[str, float]


class Guard:
    """Looks at every step: counts and explains skipped updates, reports loss spikes, stops after too many bad steps.

    On a CUDA device it looks at a step once the next one is under way, so that the device does not wait, and while
    steps are bad, at once. Its counts go on after a resume from `values`.

    Args:
        run: the whole config, for `training.max_bad_steps` and `training.spike_sigmas`.
        saved: `values()` of the checkpoint that the run goes on from.
        give_up: called with the last of too many bad steps in a row; returns how to repeat it.
        speak: whether this rank says what it sees.
        model_of: the model, from what is trained.
    """

    def __init__(
        self,
        run: RunConfig,
        saved: Mapping[str, Any],
        give_up: Callable[[Any, BadStep], str],
        speak: bool,
        model_of: Callable[[Any], LMParams] = FULL.model_of,
    ) -> None:
        self.run, self.give_up, self.speak, self.model_of = run, give_up, speak, model_of
        self.skipped = int(saved.get("skipped", 0))
        self.spikes = int(saved.get("spikes", 0))
        self.in_a_row = int(saved.get("bad_in_a_row", 0))
        self.losses = [float(x) for x in saved.get("losses", ())][-RECENT_LOSSES:]
        self.pending: tuple[int, Batch, Any, Mapping[str, Tensor]] | None = None

    def inspect(self, number: int, batch: Batch, state: Any, metrics: Mapping[str, Tensor]) -> None:
        """Look at a step.

        Raises:
            ValueError: when it is the last of `training.max_bad_steps` bad ones in a row.
        """
        self.settle()
        self.pending = number, batch, state, metrics
        if metrics["loss"].is_cpu or self.in_a_row or self.run.training.max_bad_steps == 1:
            self.settle()

    def settle(self) -> None:
        """Look at what was not looked at yet; raises as `inspect` does."""
        if self.pending is None:
            return
        (number, batch, state, metrics), self.pending = self.pending, None
        names = [name for name in metrics if name in ("loss", "skipped", "loss_scale") or name.startswith("grad_norm")]
        numbers = torch.stack([metrics[name].detach().double() for name in names]).tolist()  # one wait for all
        values = dict(zip(names, numbers, strict=True))
        if not values["skipped"]:
            self.in_a_row = 0
            self._look_for_a_spike(number, values["loss"])
            return
        self.skipped += 1
        step = BadStep(number, batch, values)
        if math.isfinite(values["loss"]) and values.get("loss_scale", 0.0) > SMALLEST_SCALE:
            # fp16: the scale was too large, which is how it finds out.
            self._say(f"step {number}: a gradient is not finite at loss scale {values['loss_scale']:g}; halved")
            return
        self.in_a_row += 1
        self._explain(state, step)
        if self.in_a_row >= self.run.training.max_bad_steps:
            to_repeat = self.give_up(state, step)
            raise ValueError(
                f"step {number}: {self.in_a_row} steps in a row without a finite loss and gradient; "
                f"{to_repeat}; then lower training.optimizer.lr or "
                "lengthen training.scheduler.warmup_steps, and go on from an earlier checkpoint"
            )

    def counts(self) -> dict[str, int]:
        """What happened since the last call."""
        self.settle()
        counts = {"skipped": self.skipped, "loss_spikes": self.spikes}
        self.skipped = self.spikes = 0
        return counts

    def values(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        self.settle()
        return {
            "skipped": self.skipped,
            "spikes": self.spikes,
            "bad_in_a_row": self.in_a_row,
            "losses": list(self.losses),
        }

    def _explain(self, state: Any, step: BadStep) -> None:
        training, values = self.run.training, step.values
        norms = [value for name, value in values.items() if name.startswith("grad_norm/")]
        offender = first_nonfinite(self.model_of(state.params), step.batch, self.run.model, training, norms)
        self._say(
            f"step {step.number}: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}: not updated "
            f"({self.in_a_row} in a row, {training.max_bad_steps} end the run); {offender}"
        )

    def _look_for_a_spike(self, number: int, loss: float) -> None:
        sigmas, before = self.run.training.spike_sigmas, self.losses
        if sigmas is not None and len(before) >= LOSSES_BEFORE_SPIKES:
            mean, deviation = statistics.fmean(before), statistics.pstdev(before)
            if loss > mean + sigmas * deviation:
                self.spikes += 1
                self._say(
                    f"step {number}: the loss leaps to {loss:.4g}, from {mean:.4g} ± {deviation:.2g} over the last "
                    f"{len(before)} steps"
                )
        self.losses = [*before, loss][-RECENT_LOSSES:]

    def _say(self, line: str) -> None:
        if self.speak:
            tqdm.write(line)


def joined(batches: Sequence[Batch]) -> Batch:
    """The batches of all ranks as one, on the CPU."""
    tokens, targets = zip(*batches, strict=True)
    return Batch(torch.cat([x.cpu() for x in tokens]), torch.cat([x.cpu() for x in targets]))
