"""Everything a fine-tuning run is told on the command line, validated."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlm_mhc.checkpoint import load_config
from rlm_mhc.checkpoint.config_files import load_generation_config
from rlm_mhc.config import LoraConfig
from rlm_mhc.data import (
    Prepared,
    chat_parse,
    completion_parse,
    find_format,
    load_tokenizer,
    prepare_examples,
    record_source,
    with_template,
)
from rlm_mhc.data.instructions import FORMATS
from rlm_mhc.data.sources import find_files
from rlm_mhc.data.tokenizer import has_tokenizer
from rlm_mhc.train.run_config import DataConfig, Reader, RunConfig
from rlm_mhc.validation import location, one_of, section


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneData(DataConfig):
    """What to fine-tune on.

    `format` is that of all lines, `auto` that of the first good one: `text` documents, packed as in pretraining;
    `completion` or `chat`, one example per row, the loss on what is to be said. `chat_template` is a file of Jinja, or
    `chatml`, in place of the tokenizer's own.
    """

    format: str = one_of(*FORMATS)
    chat_template: str | None = location(None)

    def kind(self) -> str:
        """The format, found out where it is `auto`.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when no line tells, or an option would be ignored.
        """
        kind = self.format
        if self.train_path is None and kind not in ("auto", "text"):
            raise ValueError(f"data.format={kind}: the built-in corpus is text; give data.train_path")
        if kind == "auto":
            kind = find_format(self.train_path, self.text_field) if self.train_path else "text"
        if self.chat_template is not None and kind != "chat":
            raise ValueError(
                f"data.chat_template={self.chat_template}: the data are of the format {kind}, which has no use for it; "
                "leave it out, or set data.format=chat"
            )
        return kind

    def reader(self) -> Reader:
        """See `DataConfig.reader`."""
        kind = self.kind()
        if kind == "text":
            return super().reader()
        paths = {"data.train_path": self.train_path, "data.eval_path": self.eval_path}
        for key, path in paths.items():
            if path:
                find_files(path, key)

        def read(folder: Path, name: str, vocab_size: int) -> Prepared:
            tokenizer = load_tokenizer(name, vocab_size)
            parse = chat_parse(with_template(tokenizer, self.chat_template)) if kind == "chat" else completion_parse()
            source, eval_source = (record_source(path, parse, key=key) if path else None for key, path in paths.items())
            assert source is not None
            print(f"data         {source.name}, of the format {kind}", flush=True)
            return prepare_examples(folder, source, eval_source, tokenizer=tokenizer, **self.reading())

        return read


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """A fine-tuning run: it starts from the weights in the folder `checkpoint`, whose model `model` is.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """

    checkpoint: str = location("")
    lora: LoraConfig = section(LoraConfig)
    data: FinetuneData = section(FinetuneData)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoint:
            raise ValueError(NO_CHECKPOINT)
        if self.resume_from_checkpoint is not None or self.resume_optimizer is not None:
            raise ValueError(
                "resume_from_checkpoint: fine-tuning starts from the weights that checkpoint=DIR names, and goes on "
                "where it left off with resume=auto"
            )

    @property
    def evaluates_first(self) -> bool:
        """What the checkpoint is worth before any update is worth knowing."""
        return True

    @property
    def adapters(self) -> LoraConfig | None:
        """Those that are trained in place of all weights."""
        return self.lora if self.lora.rank else None

    @property
    def generation(self) -> dict[str, Any]:
        """That of the checkpoint."""
        return load_generation_config(Path(self.checkpoint))

    @property
    def tokenizer(self) -> str:
        """The path or name of the tokenizer: for `data.tokenizer=auto` that of the checkpoint.

        Raises:
            FileNotFoundError: when that has none.
        """
        if self.data.tokenizer != "auto":
            return self.data.tokenizer
        if not has_tokenizer(Path(self.checkpoint)):
            raise FileNotFoundError(
                f"checkpoint={self.checkpoint}: it has no tokenizer; give that of the model by data.tokenizer=PATH"
            )
        return self.checkpoint


NO_CHECKPOINT = "checkpoint: name the folder of the model to start from, as in checkpoint=outputs/…/checkpoint-1000"


def with_model(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a command line with the `model` of the checkpoint that they name.

    Raises:
        FileNotFoundError: when there is no such checkpoint.
        ValueError: when none is named, it is damaged, or a model is given.
    """
    if "model" in values:
        raise ValueError("model: what is fine-tuned has the shape of its checkpoint; leave the key out")
    if values.get("checkpoint") in (None, ""):
        raise ValueError(NO_CHECKPOINT)
    folder = Path(str(values["checkpoint"])).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint={folder}: no such folder")
    return {**values, "model": dataclasses.asdict(load_config(folder))}
