"""The axis names of this library, each with one meaning, and the tensor types built from them.

| axis | meaning |
|---|---|
| `*b` | any leading batch axes, possibly none |
| `s` | position in the sequence |
| `places` | room for tokens in a row of a cache |
| `n` | residual streams |
| `c` | width of one stream (`hidden_dim`) |
| `h`, `kv` | query heads, key/value heads |
| `d` | width of one head |
| `f` | width of the MLP (`ffn_dim`) |
| `v` | vocabulary |
| `m` | raw mappings of one sub-layer, `2n + n²` |
| `leaves` | tensors of a tree, in its order |
| `out`, `in` | direction of a square or weight axis: `w[out, in]` maps `in` to `out` |
"""

from jaxtyping import Float, Int
from torch import Tensor

Scalar = Float[Tensor, ""]
Streams = Float[Tensor, "*b n c"]
Activations = Float[Tensor, "*b c"]
PerStream = Float[Tensor, "*b n"]
StreamMatrix = Float[Tensor, "*b out=n in=n"]
Vector = Float[Tensor, " c"]
Tokens = Int[Tensor, "*b s"]
Logits = Float[Tensor, "*b s v"]
PerRow = Int[Tensor, "*b"]
NextLogits = Float[Tensor, "*b v"]
RotaryTable = Float[Tensor, "*t s half"]

IGNORED_TARGET = -100
