"""LoRA adapters on disk as the library peft writes and reads them, without needing it."""

import json
from pathlib import Path

import torch
from torch import Tensor

from rlm_mhc.checkpoint.tensors import read_tensors, write_tensors
from rlm_mhc.checkpoint.weights import require_fit
from rlm_mhc.config import LoraConfig
from rlm_mhc.disk import replace_file
from rlm_mhc.fn import LoraParams
from rlm_mhc.tree import from_named, named_leaves

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(folder: Path, trained: LoraParams, lora: LoraConfig, base: str) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; `base` is where peft is to look for the model.

    Raises:
        OSError: when they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_peft_config(trained, lora, base), indent=2) + "\n"
    replace_file(folder / ADAPTER_CONFIG, lambda file: file.write_text(text, encoding="utf-8"))
    replace_file(folder / ADAPTER_WEIGHTS, lambda file: write_tensors(file, _peft_names(trained)))


def load_adapter(folder: Path, example: LoraParams, device: torch.device | str = "cpu") -> LoraParams:
    """The adapters in a folder, which must be like `example`; the dtypes are those of the file.

    Raises:
        FileNotFoundError: when there are none.
        ValueError: on a damaged file, or adapters of other names or shapes.
    """
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: it has no {ADAPTER_WEIGHTS}")
    named = read_tensors(file, device)
    require_fit(named, {name: tuple(leaf.shape) for name, leaf in _peft_names(example).items()}, str(file))
    return from_named(example, {ours: named[_peft_name(ours)] for ours in named_leaves(example)})


def _peft_names(trained: LoraParams) -> dict[str, Tensor]:
    return {_peft_name(name): leaf for name, leaf in named_leaves(trained).items()}


def _peft_name(name: str) -> str:
    return f"base_model.model.{name}" + (".weight" if name.endswith(("lora_A", "lora_B")) else "")


def _peft_config(trained: LoraParams, lora: LoraConfig, base: str) -> dict[str, object]:
    sites = [name for name in trained.layers[0] if name.endswith("_mhc")] + ["head_mhc"] * bool(trained.head_mhc)
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": sites or None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": list(lora.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
