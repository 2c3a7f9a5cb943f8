"""A run's metrics as one picture."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlm_mhc.disk import replace_file

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
    """Loss, learning rate, gradient norm and gains over steps, written to a PNG that replaces the former one; with
    mHC also the backward gain of each layer over steps."""
    layered = [(r["step"], r["mhc/layers"]["gain_backward"]) for r in records if "mhc/layers" in r]
    figure = new_figure(16 if layered else 11, 7)
    grid = figure.add_gridspec(2, 3 if layered else 2)
    for number, (name, label, keys) in enumerate(PANELS):
        axes = figure.add_subplot(grid[number // 2, number % 2])
        for key in keys:
            _draw_series(axes, key, [(r["step"], r[key]) for r in records if r.get(key) is not None])
        label_axes(axes, name, label)
        axes.grid(alpha=0.25)
        axes.ticklabel_format(axis="y", useOffset=False)
        if len(keys) > 1:
            axes.legend(frameon=False)
    if layered:
        _draw_layers(figure, figure.add_subplot(grid[:, 2]), layered)
    save_figure(figure, file, title)


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of a size in inches.

    matplotlib is imported without `MPLBACKEND`: a file needs no backend, and matplotlib refuses one that is not
    installed, such as the one that a notebook names.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return Figure(figsize=(width, height), layout="constrained")


def label_axes(axes: Any, title: str, label: str) -> None:
    """Title, the step below, and what is shown over it, as in all pictures of this package."""
    axes.set_title(title, color=INK, fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Any, file: Path, title: str) -> None:
    """Write a PNG that replaces the former one."""
    figure.suptitle(title, color=INK, fontsize=12, parse_math=False)  # a folder may be named $x
    replace_file(file, lambda path: figure.savefig(path, dpi=110, format="png"), durable=False)


def _draw_series(axes: Any, key: str, points: Sequence[tuple[int, float]]) -> None:
    colour, legend = SERIES.get(key, ("#4393c3", None))
    marker = "o" if key == "eval/loss" or len(points) == 1 else None
    columns = zip(*points, strict=True) if points else ((), ())
    axes.plot(*columns, color=colour, label=legend, marker=marker, markersize=4)


def _draw_layers(figure: Any, axes: Any, layered: Sequence[tuple[int, Sequence[float]]]) -> None:
    """A heat map: each logged step a column that reaches back to the one before, each layer a row."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import ScalarFormatter

    steps, gains = zip(*layered, strict=True)
    edges = [0 if len(steps) == 1 else max(0, 2 * steps[0] - steps[1]), *steps]
    rows = [list(map(_shown, row)) for row in zip(*gains, strict=True)]
    largest = max((gain for row in rows for gain in row if gain == gain), default=1.0)
    # From 1, where nothing is amplified, to at least 2, so that colours of healthy runs compare.
    norm = LogNorm(vmin=1.0, vmax=max(2.0, largest))
    mesh = axes.pcolormesh(edges, [i - 0.5 for i in range(len(rows) + 1)], rows, norm=norm, cmap="viridis")
    bar = figure.colorbar(mesh, ax=axes, format=ScalarFormatter())
    bar.ax.yaxis.set_minor_formatter(ScalarFormatter())
    bar.set_label("largest column sum of the mappings from the top down to the layer")
    label_axes(axes, "backward gain by layer", "layer (0 is next to the embedding)")
    axes.yaxis.get_major_locator().set_params(integer=True)


def _shown(gain: float | None) -> float:
    """A gain as a logarithmic scale takes it."""
    return max(gain, 1e-6) if gain is not None and math.isfinite(gain) else math.nan
