"""A run's metrics as one picture."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

INK = "#333333"
SERIES = {
    "train/loss": ("#9ecae1", "training"),
    "eval/loss": ("#d6604d", "held out"),
    "mhc/gain_forward": ("#4393c3", "forward"),
    "mhc/gain_backward": ("#d6604d", "backward"),
}
PANELS = (
    ("loss", "cross-entropy (nats per token)", ("train/loss", "eval/loss")),
    ("learning rate", "learning rate", ("train/lr",)),
    ("gradient norm", "global norm before clipping", ("grad_norm",)),
    ("composite gain of the residual mappings", "largest row / column sum", ("mhc/gain_forward", "mhc/gain_backward")),
)


def draw_curves(records: Sequence[dict[str, Any]], file: Path, title: str = "") -> None:
    """Loss, learning rate, gradient norm and gains over steps, written to a PNG that replaces the former one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (name, label, keys) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for key in keys:
            points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
            colour, legend = SERIES.get(key, ("#4393c3", None))
            marker = "o" if key == "eval/loss" or len(points) == 1 else None
            axes.plot(
                *zip(*points, strict=True) if points else ((), ()),
                color=colour,
                label=legend,
                marker=marker,
                markersize=4,
            )
        axes.set_title(name, color=INK, fontsize=11)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.ticklabel_format(axis="y", useOffset=False)
        if len(keys) > 1:
            axes.legend(frameon=False)
    figure.suptitle(title, color=INK, fontsize=12)
    temporary = file.with_name(f".{file.name}.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, file)
