"""Where the Triton kernels are known to be right: what `training.kernels=auto` goes by."""

PROVEN: dict[tuple[int, int], str] = {(9, 0): "kernels_cuda_90_bf16.json"}
"""Compute capability of a GPU to the file under `recipes/results/` that records their tests passing on one.

`python recipes/benchmark.py kernels` writes such a file. A test checks that each file named here records passing tests
of the current kernel source.
"""
