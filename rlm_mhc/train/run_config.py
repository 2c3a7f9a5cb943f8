"""Everything a run is told on the command line, validated."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlm_mhc.config import LoraConfig, ModelConfig, TrainConfig
from rlm_mhc.data import Prepared, Source, builtin_source, jsonl_source, prepare
from rlm_mhc.validation import at_least, between, check, location, one_of, positive, section

# `read(folder for the token files, tokenizer, vocab_size)`.
Reader = Callable[[Path, str, int], Prepared]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on: JSON lines at `train_path`, or without one the built-in corpus.

    `max_length` is the tokens per sequence; a line that cannot be read is skipped, unless `strict`, or more than
    `max_bad_fraction` of them are bad; `cache_dir` keeps tokenizer and token files (None: beside the run).
    """

    train_path: str | None = location(None)
    eval_path: str | None = location(None)
    max_length: int = at_least(1, 2048)
    tokenizer: str = location("auto")
    text_field: str = "text"
    shuffle: bool = True
    strict: bool = False
    max_bad_fraction: float = between(0, 1, 0.01)
    cache_dir: str | None = location(None)

    def __post_init__(self) -> None:
        check(self)

    def sources(self) -> tuple[Source, Source | None]:
        """Documents to train on, and to evaluate on where a path names them."""
        train = jsonl_source(self.train_path, self.text_field) if self.train_path else builtin_source()
        if not self.eval_path:
            return train, None
        return train, jsonl_source(self.eval_path, self.text_field, key="data.eval_path")

    def reader(self) -> Reader:
        """Find the files now; what is returned reads them.

        Raises:
            FileNotFoundError: when there are none.
            ValueError: when they are of no kind that can be read.
        """
        source, eval_source = self.sources()

        def read(folder: Path, tokenizer: str, vocab_size: int) -> Prepared:
            print(f"data         {source.name}", flush=True)
            return prepare(
                folder,
                source,
                eval_source,
                tokenizer=tokenizer,
                vocab_size=vocab_size,
                **self.reading(),
            )

        return read

    def reading(self) -> dict[str, Any]:
        """How data of any format are read."""
        return {name: getattr(self, name) for name in ("max_length", "strict", "max_bad_fraction")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MHCConfig:
    """What is healthy: a largest entry of `res`, or a composite gain, above `target_amax` is warned of, once."""

    target_amax: float = positive(2.0)

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks share the work; one process needs none."""

    strategy: str = one_of("ddp", later=("zero1", "zero3"))

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run: model, training, data and where it goes.

    `resume_optimizer` says whether a run from `resume_from_checkpoint` takes the optimizer, the step and with it the
    schedule as well as the weights; None: where the data are the checkpoint's.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """

    model: ModelConfig = section(ModelConfig)
    training: TrainConfig = section(TrainConfig)
    data: DataConfig = section(DataConfig)
    parallel: ParallelConfig = section(ParallelConfig)
    mhc: MHCConfig = section(MHCConfig)
    device: str = one_of("auto", "cpu", "cuda")
    seed: int = at_least(0, 42)
    output_dir: str = location("outputs/pretrain_1b")
    resume: str = one_of("never", "auto")
    resume_from_checkpoint: str | None = location(None)
    resume_optimizer: bool | None = None
    overwrite: bool = False
    debug: bool = False

    def __post_init__(self) -> None:
        check(self)
        for name, folder in (("output_dir", self.output_dir), ("data.cache_dir", self.data.cache_dir)):
            if not _is_utf8(folder or ""):
                raise ValueError(
                    f"{name}={folder}: its name is not UTF-8, and safetensors and tokenizers cannot write there; "
                    "choose another folder"
                )
        if self.data.max_length > self.model.max_seq_len:
            raise ValueError(
                f"data.max_length={self.data.max_length}: longer than the model allows "
                f"(model.max_seq_len={self.model.max_seq_len}); shorten the one or raise the other"
            )
        if self.overwrite and self.resume == "auto":
            raise ValueError("overwrite=true and resume=auto exclude each other: start over, or go on?")
        if self.resume_from_checkpoint and self.resume == "auto":
            raise ValueError("resume_from_checkpoint and resume=auto exclude each other: give one of them")
        if self.resume_optimizer is not None and not self.resume_from_checkpoint:
            raise ValueError(f"resume_optimizer={self.resume_optimizer}: only resume_from_checkpoint leaves it open")

    @property
    def evaluates_first(self) -> bool:
        """Whether there is an evaluation before the first update, as step 0."""
        return False

    @property
    def adapters(self) -> LoraConfig | None:
        """Those that are trained in place of all weights."""
        return None

    @property
    def generation(self) -> dict[str, Any]:
        """The generation config of the model that training starts from."""
        return {}

    @property
    def tokenizer(self) -> str:
        """`auto`, or the path or name of a tokenizer."""
        return self.data.tokenizer

    @property
    def token_folder(self) -> Path:
        """Where tokenizer and token files lie."""
        return Path(self.data.cache_dir) if self.data.cache_dir else Path(self.output_dir) / "tokens"


def _is_utf8(path: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in path)
