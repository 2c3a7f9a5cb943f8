"""What a checkpoint of a run holds, and its writing beside the training."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rlm_mhc.checkpoint import Writer, rng_states, save_run, snapshot
from rlm_mhc.checkpoint.config_files import write_generation_config
from rlm_mhc.checkpoint.tensors import write_tensors
from rlm_mhc.data import Position, Prepared, save_tokenizer
from rlm_mhc.disk import sync
from rlm_mhc.fn import Batch
from rlm_mhc.parallel import Ranks, from_first, gather
from rlm_mhc.program.state import TrainState
from rlm_mhc.train.guard import BadStep, joined
from rlm_mhc.train.output import BAD_STEPS, CHECKPOINTS, CONFIG_FILE, METRICS_FILE, write_config
from rlm_mhc.train.run_config import RunConfig
from rlm_mhc.train.trainable import FULL, Trainable

BATCH_FILE = "batch.safetensors"


class Saver:
    """Writes checkpoints of a run, by the first rank, in a thread; as a context, it ends with what is under way.

    A checkpoint that cannot be written is told of, and the training goes on.
    """

    def __init__(self, run: RunConfig, data: Prepared, ranks: Ranks, trainable: Trainable = FULL) -> None:
        self.run, self.data, self.ranks, self.trainable = run, data, ranks, trainable
        self.generation = run.generation
        self.writer = Writer(lambda line: tqdm.write(f"{line}; the training goes on, earlier checkpoints are whole"))
        self.newest = -1
        self.stalled = 0.0

    def save(self, state: TrainState, position: Position, tokens: int, watch: dict[str, Any]) -> None:
        """Copy the state, and begin to write it; to be called by every rank."""
        began = time.perf_counter()
        self._begin(state, position, tokens, watch)
        self.stalled += time.perf_counter() - began

    def stall(self) -> dict[str, float]:
        """The seconds that saves kept the steps waiting since the last call, if there was one."""
        seconds, self.stalled = self.stalled, 0.0
        return {"save_stall": seconds} if seconds else {}

    def _begin(self, state: TrainState, position: Position, tokens: int, watch: dict[str, Any]) -> None:
        states = gather(self.ranks, rng_states())
        number = int(state.step)
        if not self.ranks.is_first or number == self.newest:
            return
        self.newest = number
        described = self._describe(state, position, tokens, watch)
        self.writer.wait()  # before there is another copy
        trained, optimizer = snapshot((state.params, state.optimizer))
        params = self.trainable.model_of(trained)
        folder = Path(self.run.output_dir)
        saved = partial(
            save_run,
            folder / CHECKPOINTS,
            params,
            self.run.model,
            optimizer,
            described,
            keep=self.run.training.save_total_limit,
            generators=states,
            extras=partial(self._extras, trained),
        )
        self.writer.submit(
            partial(_after_metrics, folder / METRICS_FILE, saved), f"{folder / CHECKPOINTS}/checkpoint-{number}"
        )

    def finish(self) -> None:
        """Wait for the last checkpoint.

        Raises:
            OSError: when it could not be written.
        """
        if error := self.writer.wait():
            raise OSError(f"the training is done, but its last checkpoint could not be written: {error}")

    def save_bad_step(self, state: TrainState, step: BadStep) -> str:
        """Write the state that a skipped step ran on and left, with its batch; returns how to repeat it, or why not.

        To be called by every rank; none returns before it is written: one that ends by an error ends the others.
        """
        batch = joined(gather(self.ranks, step.batch))
        return from_first(self.ranks, lambda: self._write_bad_step(state, step, batch))

    def _write_bad_step(self, state: TrainState, step: BadStep, batch: Batch) -> str:
        described = {
            "step": step.number,
            "bad_step": {name: repr(value) for name, value in step.values.items()},
            "world": self.ranks.world,
            **self.trainable.facts,
        }

        def extras(target: Path) -> None:
            self._extras(state.params, target)
            write_tensors(target / BATCH_FILE, batch._asdict())

        self.writer.wait()  # a checkpoint under way is not to be cut off either
        folder, params = Path(self.run.output_dir) / BAD_STEPS, self.trainable.model_of(state.params)
        try:
            path = save_run(folder, params, self.run.model, state.optimizer, described, keep=1, extras=extras)
        except OSError as error:
            return f"the last of them could not be saved for recipes/replay.py ({error})"
        return f"python recipes/replay.py {path} repeats the last of them"

    def _extras(self, trained: Any, folder: Path) -> None:
        self.trainable.write(folder, trained)
        write_config(self.run, folder / CONFIG_FILE)
        save_tokenizer(self.data.tokenizer, folder)
        write_generation_config(folder, self.data.tokenizer, self.generation, self.data.stop_token_ids)

    def _describe(self, state: TrainState, position: Position, tokens: int, watch: dict[str, Any]) -> dict[str, Any]:
        described = {
            "step": int(state.step),
            "tokens": tokens,
            "sequences_per_step": self.run.training.sequences_per_step * self.ranks.world,
            "position": position._asdict(),
            "data": self.data.fingerprint,
            "windows": self.data.train.total,
            "max_length": self.run.data.max_length,
            "watch": watch,
            "torch_version": torch.__version__,
            **self.trainable.facts,
        }
        if state.loss_scale:
            described["loss_scale"] = {name: value.item() for name, value in state.loss_scale._asdict().items()}
        return described

    def __enter__(self) -> "Saver":
        self.writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.writer.__exit__(*error)


def _after_metrics(metrics: Path, save: Callable[[], object]) -> None:
    if metrics.exists():
        sync(metrics)  # what a resumed run expects to find of the steps before
    save()
