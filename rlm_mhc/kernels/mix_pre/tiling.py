"""How the backward of `mix_pre` divides its work: by the shape alone, never by the device or the tokens at hand."""

import torch

from rlm_mhc.kernels.launch import blocks, interpreted, power_of_two

LEAST_COLUMNS = 16  # of a tile in a matrix product
PROGRAMS = 512
MOST_AT_ONCE = 4  # streams in the registers of one program; with more of them there is a program for each


def apply_tile(n: int, raw: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles such that the sums for `phi`, `G · BC · MB` numbers, stay in registers, and their warps."""
    columns = power_of_two(raw, LEAST_COLUMNS)
    if interpreted():
        return dict(
            BT=128,
            BC=64,
            MB=max(LEAST_COLUMNS, columns // 2),
            G=n if n <= MOST_AT_ONCE else 1,
            num_warps=4,
            num_stages=2,
        )
    if n > MOST_AT_ONCE and dtype == torch.float32:
        return dict(BT=16, BC=32, MB=min(columns, 64), G=1, num_warps=8, num_stages=2)
    if n > MOST_AT_ONCE:
        whole = dtype == torch.bfloat16 and columns <= 128
        return dict(BT=32, BC=64, MB=columns if whole else 64, G=1, num_warps=4, num_stages=2)
    return dict(BT=16, BC=64 if dtype == torch.bfloat16 else 32, MB=columns, G=n, num_warps=4, num_stages=2)


def apply_grid(n: int, c: int, raw: int, tokens: int, tile: dict[str, int]) -> tuple[int, int, int]:
    """Programs over channels, over tokens, and over columns of `phi`."""
    channels, parts = n // tile["G"] * blocks(c, tile["BC"]), blocks(raw, tile["MB"])
    return channels, max(1, min(PROGRAMS // (channels * parts), blocks(tokens, tile["BT"]))), parts


def largest_partial_sums(n: int, c: int) -> int:
    """Numbers in the partial sums of `phi`'s gradient with any number of tokens."""
    raw = 2 * n + n * n
    tiles = [apply_tile(n, raw, dtype) for dtype in (torch.bfloat16, torch.float32)]
    return max(apply_grid(n, c, raw, 1 << 40, tile)[1] for tile in tiles) * n * c * raw
