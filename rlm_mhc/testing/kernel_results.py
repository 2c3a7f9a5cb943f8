"""Results of `recipes/benchmark_kernels.py`: joined from parts, and printed."""

import json
import sys
from pathlib import Path
from typing import Any

BEYOND_CACHES = 10**8  # bytes: what a GPU's caches do not hold, and so many must move for a share of the bandwidth
SAME = ("device", "versions", "source", "dtype", "iterations", "smoke")


def merged(result: dict[str, Any], file: Path) -> dict[str, Any]:
    """A result with the tests and sizes that a file has of the same source, device, versions and settings."""
    if not file.is_file():
        return result
    earlier = json.loads(file.read_text(encoding="utf-8"))
    if differing := [key for key in SAME if earlier.get(key) != result[key]]:
        print(f"{file} is of another {' and '.join(differing)}: it is replaced", file=sys.stderr)
        return result
    return result | {"tests": result["tests"] or earlier["tests"], "sizes": earlier["sizes"]}


def size_of(measured: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one measurement from another."""
    return tuple(measured[key] for key in ("op", "n", "c", "tokens"))


def table(result: dict[str, Any]) -> str:
    """The result for people."""

    def share(moved: int, milliseconds: float, copied: float) -> str:
        return f"{moved / (1e6 * milliseconds * copied):.1%}" if moved >= BEYOND_CACHES else "-"

    lines = [f"{result['device']}, {result['dtype']}, {result['date']}"]
    head = ("fwd ms", "of copy", "bwd ms", "of copy", "error", "ours is")
    lines.append(f"{'op':<22}{'n':>3}{'c':>6}{'tokens':>8}  {'':<20}" + "".join(f"{word:>9}" for word in head))
    for m in result["sizes"]:
        for who, r in m["rows"].items():
            shares = [share(m[f"{x}_bytes"], r[f"{x}_ms"], m["copy_gb_per_s"]) for x in ("forward", "backward")]
            lines.append(
                f"{m['op']:<22}{m['n']:>3}{m['c']:>6}{m['tokens']:>8}  {who:<20}"
                f"{r['forward_ms']:>9.3f}{shares[0]:>9}{r['backward_ms']:>9.3f}{shares[1]:>9}"
                f"{r['error']:>9.0e}{r['ours_faster']:>8.2f}×"
            )
    reasons = {f"{who}: {why}" for m in result["sizes"] for who, why in m["left_out"].items()}
    return "\n".join([*lines, *(f"left out {reason}" for reason in sorted(reasons))])
