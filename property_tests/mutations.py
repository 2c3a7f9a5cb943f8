"""Break the package on purpose and see which law notices: `python property_tests/mutations.py [name …]`.

Each mutation replaces one node of the syntax tree of one function, in a copy of the package; the laws are run on the
copy. The command ends with 1 if a mutation is not noticed or a law never fails. `--list` prints the names.
"""

import ast
import copy
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
AT_ONCE = 2
COMMAND = ["-m", "pytest", "property_tests", "-m", "not slow", "--hypothesis-profile=mutations", "-q", "-rf"]
# Its laws hold for broken mathematics as well: no mutation here is one of reading hostile bytes.
COMMAND += ["--ignore=property_tests/test_hostile.py"]


class Mutation(NamedTuple):
    """In one function the one node of the form `old` becomes `new`, or a statement goes where `new` is empty.

    `$name` in `old` matches any expression, the same one wherever it stands, and is that expression in `new`. `function`
    is a dotted name, "" the whole file; `file` is relative to the package.
    """

    name: str
    file: str
    function: str
    old: str
    new: str


# fmt: off
MUTATIONS = [
    Mutation("res transposed", "fn/mhc.py", "mhc_combine", "$res.unbind(-1)", "$res.unbind(-2)"),
    Mutation("post dropped", "fn/mhc.py", "mhc_combine", "$mixed = $post.unsqueeze(-1) * $output", "$mixed = $post.unsqueeze(-1) ** 0 * $output"),
    Mutation("combine in the mappings' dtype", "fn/mhc.py", "mhc_combine", "$mixed.to($streams.dtype)", "$mixed"),
    Mutation("factor 2 forgotten", "fn/mhc.py", "activate", "2 * torch.sigmoid($post)", "torch.sigmoid($post)"),
    Mutation("bias without gradient", "fn/mhc.py", "activate", "$a * $x + $b", "$a * $x + $b.detach()"),
    Mutation("alphas in another order", "fn/mhc.py", "activate", "$alpha.unbind()", "$alpha.flip(0).unbind()"),
    Mutation("pre without sigmoid", "fn/mhc.py", "activate", "$pre = torch.sigmoid($pre)", ""),
    Mutation("hc without tanh", "fn/mhc.py", "activate", "torch.tanh($h)", "$h.clone()"),
    Mutation("norm over all tokens", "fn/mhc.py", "_project", "$wide.square().mean(-1, keepdim=True)", "$wide.square().mean()"),
    Mutation("norm over the sequence", "fn/mhc.py", "_project", "$wide.square().mean(-1, keepdim=True)", "$wide.square().mean((-1, -2)[: $wide.dim()], keepdim=True)"),
    Mutation("norm without eps", "fn/mhc.py", "_project", "$wide.square().mean(-1, keepdim=True) + $eps", "$wide.square().mean(-1, keepdim=True)"),
    Mutation("mappings in the streams' dtype", "fn/mhc.py", "_project", "widen($flat)", "$flat"),
    Mutation("streams summed at the exit", "fn/mhc.py", "collapse_streams", "widen($streams).mean(-2)", "widen($streams).sum(-2)"),
    Mutation("streams unequal at the entry", "fn/mhc.py", "expand_streams", "$x.unsqueeze(-2).repeat_interleave($n, dim=-2)", "$x.unsqueeze(-2) * torch.arange(1, $n + 1).view($n, 1)"),
    Mutation("learned head without its bias", "fn/mhc.py", "collapse_learned", "$params.alpha * $h + $params.bias", "$params.alpha * $h"),
    Mutation("pre of the own sub-layer", "fn/block.py", "_mixed", "$given if early else pre", "pre"),
    Mutation("first pre reads the last stream", "fn/lm.py", "expand", "torch.arange($n, dtype=torch.int64, device=$d) == 0", "torch.arange($n, dtype=torch.int64, device=$d) == $n - 1"),
    Mutation("residual without mHC doubled", "fn/block.py", "_mixed", "$x + $output", "2 * $x + $output"),
    Mutation("columns alone", "fn/sinkhorn.py", "_iterate", "torch.log_softmax(torch.log_softmax($log, dim=0), dim=1)", "torch.log_softmax($log, dim=0)"),
    Mutation("rows alone", "fn/sinkhorn.py", "_iterate", "torch.log_softmax($log, dim=0)", "$log"),
    Mutation("rows first", "fn/sinkhorn.py", "_iterate", "torch.log_softmax(torch.log_softmax($log, dim=0), dim=1)", "torch.log_softmax(torch.log_softmax($log, dim=1), dim=0)"),
    Mutation("a favoured corner", "fn/sinkhorn.py", "_Sinkhorn.forward", "_tokens_last($logits)", "_tokens_last($logits + torch.eye($logits.shape[-1]))"),
    Mutation("raw numbers read by columns", "fn/projections.py", "project", "$wide.unflatten(-1, ($n, $n))", "$wide.unflatten(-1, ($n, $n)).mT"),
    Mutation("logits not bounded", "fn/sinkhorn.py", "_iterate", "_bounded($logits)", "$logits"),
    Mutation("logits not bounded in the backward", "fn/sinkhorn.py", "_outcomes", "_bounded($logits)", "$logits"),
    Mutation("NaN counts as the largest logit", "fn/sinkhorn.py", "_bounded", "$logits.clamp(-_limit($logits), _limit($logits))", "torch.fmin($logits.clamp(-_limit($logits), _limit($logits)), $logits.new_tensor(_limit($logits)))"),
    Mutation("exp of the logits in the backward", "fn/sinkhorn.py", "_outcomes", "torch.log_softmax($log, dim=$axis)", "($log.exp() / $log.exp().sum($axis, keepdim=True)).log()"),
    Mutation("backward of the limit", "fn/sinkhorn.py", "_pull", "_outcomes($logits, $num_iters, $eps)", "_outcomes($logits, $num_iters + 100, $eps)"),
    Mutation("one iteration fewer in the backward", "fn/sinkhorn.py", "_pull", "_outcomes($logits, $num_iters, $eps)", "_outcomes($logits, max(1, $num_iters - 1), $eps)"),
    Mutation("backward stops early", "fn/sinkhorn.py", "_pull", "reversed($tape)", "reversed($tape[1:])"),
    Mutation("eps left out of the backward", "fn/sinkhorn.py", "_pull", "$g = $g * ($m / $shifted)", ""),
    Mutation("jvp of one axis", "fn/sinkhorn.py", "_Sinkhorn.jvp", "($m * $t).sum($axis, keepdim=True)", "($m * $t).sum(0, keepdim=True)"),
    Mutation("implicit without columns", "fn/sinkhorn.py", "_without_sums", "$u + $v.mT", "$u"),
    Mutation("permutations not normalised", "fn/projections.py", "permutation_mixture", "$raw.softmax(-1)", "$raw.sigmoid()"),
    Mutation("permutations inverted", "fn/projections.py", "permutation_mixture", "$order[$i] == $j", "$order[$j] == $i"),
    Mutation("kronecker with the wrong other", "fn/projections.py", "kronecker_product", "torch.sigmoid(-$raw)", "torch.sigmoid(-$raw) * 0.9"),
    Mutation("kronecker factors in another order", "fn/projections.py", "kronecker_product", "$factors.unbind(-3)", "$factors.flip(-3).unbind(-3)"),
    Mutation("cayley of no skew matrix", "fn/projections.py", "orthostochastic", "$ones.triu(1) - $ones.tril(-1)", "$ones.triu(1) + $ones.tril(-1)"),
    Mutation("blocks not averaged", "fn/projections.py", "orthostochastic", "$squares.sum((-3, -1)) / $block", "$squares.sum((-3, -1))"),
    Mutation("skew numbers not bounded", "fn/projections.py", "orthostochastic", "$raw.double().clamp(-LARGEST_SKEW, LARGEST_SKEW)", "$raw.float().square()"),
    Mutation("skew numbers start at zero", "variants.py", "_orthostochastic_start", "($t,)", "(0 * $t,)"),
    Mutation("gain in reverse order", "fn/gain.py", "composite_gain", "product($matrix, $whole)", "product($whole, $matrix)"),
    Mutation("cumulative gain a layer short", "fn/gain.py", "cumulative_gain", "len($res)", "len($res) - 1"),
    Mutation("attention sees the future", "fn/attention.py", "causal_attention", "F.scaled_dot_product_attention($q, $k, $v, is_causal=True, enable_gqa=$a != $b)", "F.scaled_dot_product_attention($q, $k, $v, is_causal=False, enable_gqa=$a != $b)"),
    Mutation("forward mode sees the future", "fn/attention.py", "causal_attention", "F.scaled_dot_product_attention($q, $k, $v, is_causal=True, enable_gqa=True)", "F.scaled_dot_product_attention($q, $k, $v, is_causal=False, enable_gqa=True)"),
    Mutation("a decoded token does not see itself", "fn/decode.py", "extend", "torch.arange($n, dtype=torch.int64, device=$d) <= $at", "torch.arange($n, dtype=torch.int64, device=$d) < $at"),
    Mutation("all prompts end where the longest does", "fn/decode.py", "_last", "$lengths - 1", "$lengths * 0 + x.shape[axis] - 1"),
    Mutation("the cache is written a place late", "fn/cache.py", "write", "$places.reshape(len(rows), -1)", "($places.reshape(len(rows), -1) + 1) % cached.shape[-2]"),
    Mutation("res starts at the identity", "variants.py", "", "RES_DIAGONAL_INIT = $x", "RES_DIAGONAL_INIT = 1 - 1e-15"),
    Mutation("res starts far from the identity", "variants.py", "", "RES_DIAGONAL_INIT = $x", "RES_DIAGONAL_INIT = 0.9"),
    Mutation("pre starts at one half", "params.py", "_averaging", "-math.log($n - 1) if $n > 1 else 0.0", "0.0"),
    Mutation("hc starts with a sum", "params.py", "_gates", "1 / $n", "1.0"),
    Mutation("phi starts at zero", "params.py", "_mhc", "WeightSpec($shape, std=INIT_STD, decay=True, fp32=True)", "WeightSpec($shape, decay=True, fp32=True)"),
    Mutation("phi narrow", "params.py", "_mhc", "WeightSpec($shape, std=INIT_STD, decay=True, fp32=True)", "WeightSpec($shape, std=INIT_STD, decay=True)"),
    Mutation("alpha decays", "params.py", "_mhc", "WeightSpec((3,), mean=$alpha, fp32=True)", "WeightSpec((3,), mean=$alpha, fp32=True, decay=True)"),
    Mutation("noise in the dtype of the weight", "params.py", "WeightSpec.init", "torch.randn($shape, generator=$g, dtype=torch.float32, device='cpu')", "torch.randn($shape, generator=$g, dtype=dtype, device='cpu')"),
    Mutation("head not counted", "params.py", "count", "weight_table($config)", "weight_table($config)[:3]"),
    Mutation("program forgets the aggregate", "program/hyper.py", "hyper.backward", "$g_combine + $g_aggregate + $g_mappings", "$g_combine + $g_mappings"),
    Mutation("program forgets the norm of the streams", "program/hyper.py", "_mappings_stage.backward", "$g_product @ $phi.to($flat.dtype).mT - $inner * $flat", "$g_product @ $phi.to($flat.dtype).mT"),
    Mutation("program forgets the next pre", "program/hyper.py", "hyper.backward", "MHCMappings($g, $g_post, $g_res)", "MHCMappings(g_pre, $g_post, $g_res)"),
    Mutation("program forgets the skip of the residual", "stage/core.py", "residual.backward", "$cotangent + $x_cotangent", "$x_cotangent"),
    Mutation("program adds a microbatch twice", "program/gradients.py", "_add", "torch._foreach_add_($sums[$index], $grads)", "torch._foreach_add_($sums[$index], $grads, alpha=2)"),
    Mutation("program reduces no layer", "program/gradients.py", "_add", "$reduce is not None", "False"),
    Mutation("program forgets the scale of the loss", "program/functions.py", "make_functions.head_chunk.loss", "$scale * $loss", "$loss"),
    Mutation("embedding's gradient from one stream", "program/microbatch.py", "run_microbatch", "$streams.sum(-2, dtype=$wide)", "$streams.select(-2, 0).to($wide)"),
    Mutation("a chunk of the head overwrites the last", "program/head.py", "run_head", "$sink.add_($grad)", "$sink.copy_($grad)"),
    Mutation("attention's backward sees the future", "stage/attention.py", "_backward", "aten._scaled_dot_product_flash_attention_for_cpu_backward($g, $q, $k, $v, *$saved, 0.0, True)", "aten._scaled_dot_product_flash_attention_for_cpu_backward($g, $q, $k, $v, *$saved, 0.0, False)"),
    Mutation("SwiGLU without its gate", "program/block.py", "_swiglu_stage.narrow", "$gate * torch.sigmoid($gate) * $up", "torch.sigmoid($gate) * $up"),
    Mutation("no step is skipped", "program/step.py", "make_program.step", "(~$sum.isfinite()).to(torch.float32)", "torch.zeros_like($sum)"),
    Mutation("a step is skipped by its loss alone", "program/step.py", "make_program.step", "($norm + $loss).isfinite()", "$loss.isfinite()"),
    Mutation("duplicate inputs not guarded", "program/compile.py", "_needed", "[$needed for $guard in guards]", "[$needed and $guard.guard_type != 'DUPLICATE_INPUT' for $guard in guards]"),
    Mutation("arguments that are no tensors not guarded", "program/compile.py", "_needed", "_on_argument($guard)", "False"),
    Mutation("kernel combines by the transpose", "kernels/mix_post/triton.py", "combine_kernel", "$i if $transposed else $i * $n", "$i * $n if $transposed else $i"),
    Mutation("kernel drops post", "kernels/mix_post/triton.py", "combine_kernel", "$mixed += $added", ""),
    Mutation("kernel transposes the gradient of res", "kernels/mix_post/triton.py", "reduce_kernel", "dot($g, tl.trans($x), $products)", "dot($x, tl.trans($g), $products)"),
    Mutation("kernel projects without the norm", "kernels/mix_pre/triton.py", "project_kernel", "$h * $scale[:, None]", "$h"),
    Mutation("kernel's norm without eps", "kernels/mix_pre/triton.py", "project_kernel", "tl.sum($squares, 1) / ($n * $c) + $eps", "tl.sum($squares, 1) / ($n * $c)"),
    Mutation("kernel aggregates by ones", "kernels/mix_pre/triton.py", "project_kernel", "$u += $given[$i][:, None] * $x", "$u += $x"),
    Mutation("kernel forgets factor 2", "kernels/mix_pre/triton.py", "finish_kernel", "2 * tl.sigmoid($h)", "tl.sigmoid($h)"),
    Mutation("kernel's pre without eps", "kernels/mix_pre/triton.py", "finish_kernel", "tl.sigmoid($logit) + $eps", "tl.sigmoid($logit)"),
    Mutation("kernel's Sinkhorn of rows alone", "kernels/sinkhorn/triton.py", "sinkhorn", "(1 / (_or_one(tl.sum($m, 1)) + $eps))[:, None, :]", "1"),
    Mutation("kernel's Sinkhorn forgets to weight its cotangent", "kernels/sinkhorn/triton.py", "sinkhorn_backward", "tl.where($inside, $cotangent, 0.0) * $m", "tl.where($inside, $cotangent, 0.0)"),
    Mutation("kernel's norm backward without its mean", "kernels/mix_pre/triton_backward.py", "norm_kernel", "$g - $unit * $mean[:, None]", "$g"),
    Mutation("kernel's gate backward without alpha", "kernels/mix_pre/triton_backward.py", "gate_backward", "$g * $alpha * $r[:, None]", "$g * $r[:, None]"),
    Mutation("kernel forgets the norm of the streams", "kernels/mix_pre/triton_apply.py", "apply_kernel", "$g - $inner[:, None] * $x", "$g"),
    Mutation("dtypes lost on disk", "checkpoint/tensors.py", "write_tensors", "$tensor.detach().cpu().contiguous()", "$tensor.detach().cpu().contiguous().float()"),
    Mutation("metadata lost on disk", "checkpoint/tensors.py", "write_tensors", "{'format': 'pt', **$metadata, CHECKSUM: $checksums}", "{**$metadata, CHECKSUM: $checksums}"),
    Mutation("names changed on disk", "checkpoint/tensors.py", "write_tensors", "save_file($tensors, $file, metadata=$m)", "save_file({f'model.{k}': v for k, v in $tensors.items()}, $file, metadata=$m)"),
    Mutation("checksums not compared", "checkpoint/tensors.py", "read_tensors", "$verify and CHECKSUM in $metadata", "False"),
    Mutation("manifest not compared", "checkpoint/run.py", "load_run", "verify_run($path) if $verify else describe_run($path)", "describe_run($path)"),
    Mutation("config lost on disk", "checkpoint/config_files.py", "load_config", "build(ModelConfig, $fields)", "build(ModelConfig, $fields).replace(norm_eps=1e-05)"),
    Mutation("windows lose a token", "data/packing.py", "PackedSequences.inputs_and_targets", "$start + $self.length + 1", "$start + $self.length"),
    Mutation("windows repeat a token", "data/packing.py", "PackedSequences.inputs_and_targets", "($self.first + $index) * $self.length", "max(0, ($self.first + $index) * $self.length - 1)"),
    Mutation("targets are the inputs", "data/packing.py", "PackedSequences.inputs_and_targets", "$window[1:]", "$window[:-1]"),
    Mutation("held-out windows overlap", "data/packing.py", "hold_out", "$whole.first + $split", "$whole.first"),
    Mutation("an epoch draws with replacement", "data/loader.py", "_order", "$rng.permutation($count)", "$rng.integers(0, $count, $count)"),
    Mutation("pre sees what post spreads", "convert/gates.py", "_spread_gates", "math.sin($angle)", "math.sin($angle + 0.5)"),
    Mutation("readings not compared with one", "convert/plain.py", "_distance", "$coefficients[..., :$count] - 1", "0 * $coefficients[..., :$count]"),
    Mutation("one field for two", "convert/fields.py", "", "'num_kv_heads'", "'num_heads'"),
    Mutation("new adapters are not zero", "fn/lora.py", "_init_adapter", "torch.zeros($out, $rank, dtype=torch.float32, device=$d)", "torch.full(($out, $rank), 0.5, dtype=torch.float32, device=$d)"),
    Mutation("adapters of a layer start alike", "fn/lora.py", "_init_layer", "f'{$seed}:{$name}.{$key}'", "f'{$seed}:{$name}'"),
    Mutation("a pull without the scale", "fn/lora.py", "pull_weight", "$scale * product($grad, $a.mT)", "product($grad, $a.mT)"),
    Mutation("the base scaled with the adapter", "fn/lora.py", "merge_weight", "widen($weight)", "0.5 * widen($weight)"),
]
# fmt: on


PLACEHOLDER = "placeholder_"


def mutated(source: str, mutation: Mutation) -> str:
    """Return the source with the mutation.

    Raises:
        ValueError: unless exactly one node of the function has the form `old`.
    """
    tree = ast.parse(source)
    scope: ast.AST = tree
    for name in filter(None, mutation.function.split(".")):
        inside = [node for node in ast.walk(scope) if getattr(node, "name", None) == name]
        if len(inside) != 1:
            raise ValueError(f"{mutation.name}: {len(inside)} times {name} in {mutation.file}, not once")
        (scope,) = inside
    old, new = _pattern(mutation.old), _pattern(mutation.new)
    found: list[tuple[ast.AST, dict[str, ast.expr]]] = []
    for node in ast.walk(scope):
        bound: dict[str, ast.expr] = {}
        if _matches(old, node, bound):
            found.append((node, bound))
    if len(found) != 1:
        raise ValueError(f"{mutation.name}: {len(found)} times `{mutation.old}` in {mutation.function}, not once")
    ((target, bound),) = found
    replacement = _Replace(lambda node: isinstance(node, ast.Name) and bound.get(node.id)).visit(new)
    return ast.unparse(_Replace(lambda node: node is target and replacement).visit(tree))


def _pattern(text: str) -> ast.AST:
    body = ast.parse(text.replace("$", PLACEHOLDER)).body or [ast.Pass()]
    return body[0].value if isinstance(body[0], ast.Expr) else body[0]


def _matches(pattern: Any, node: Any, bound: dict[str, ast.expr]) -> bool:
    """Compare two trees, or two lists of them, and note in `bound` what each placeholder stands for."""
    if isinstance(pattern, ast.Name) and pattern.id.startswith(PLACEHOLDER):
        same = isinstance(node, ast.expr) and ast.unparse(bound.get(pattern.id, node)) == ast.unparse(node)
        return same and bound.setdefault(pattern.id, node) is not None
    if type(pattern) is not type(node):
        return False
    if isinstance(pattern, list):
        return len(pattern) == len(node) and all(_matches(*pair, bound) for pair in zip(pattern, node, strict=True))
    if isinstance(pattern, ast.AST):
        fields = [name for name in pattern._fields if name not in ("ctx", "type_comment")]
        return all(_matches(getattr(pattern, name), getattr(node, name), bound) for name in fields)
    return pattern == node


class _Replace(ast.NodeTransformer):
    """Put a copy of `choose(node)` in the place of each node for which it is a node."""

    def __init__(self, choose: Callable[[ast.AST], Any]) -> None:
        self.choose = choose

    def visit(self, node: ast.AST) -> ast.AST:
        chosen = self.choose(node)
        return copy.deepcopy(chosen) if chosen else self.generic_visit(node)


def mutate(mutation: Mutation | None, folder: Path) -> None:
    """Copy package and laws into a folder, with the mutation.

    Raises:
        ValueError: as `mutated`.
    """
    for name in ("rlm_mhc", "property_tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    if mutation is None:
        return
    file = folder / "rlm_mhc" / mutation.file
    file.write_text(mutated(file.read_text(), mutation))


def failing_laws(mutation: Mutation | None, laws: str = "property_tests") -> list[str]:
    """The names of the laws that fail under a mutation.

    Raises:
        RuntimeError: when no law was run, or not on the copy.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mutate(mutation, folder)
        environment = os.environ | {"PYTHONPATH": name, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        where = [sys.executable, "-c", "import importlib.util as u; print(u.find_spec('rlm_mhc').origin)"]
        found = subprocess.run(where, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
        if Path(name).resolve() not in Path(found).resolve().parents:
            raise RuntimeError(f"not the copy in {name} would be imported, but {found.strip()}")
        command = [sys.executable, *(laws if part == "property_tests" else part for part in COMMAND)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    failed = re.findall(r"^FAILED \S+::(test_\w+)", done.stdout, re.M)
    if done.returncode not in (0, 1) or (done.returncode == 1) != bool(failed):
        raise RuntimeError(f"{mutation and mutation.name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return sorted(set(failed))


def laws_there_are() -> list[str]:
    """The names of all laws that the command runs."""
    done = subprocess.run(
        [sys.executable, *COMMAND, "--collect-only"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return sorted(set(re.findall(r"::(test_\w+)", done.stdout)))


def main(chosen: list[str]) -> int:
    """Run what is chosen, all where nothing is, and print what caught what."""
    if "--list" in chosen:
        print(*(mutation.name for mutation in MUTATIONS), sep="\n")
        return 0
    unknown = set(chosen) - {mutation.name for mutation in MUTATIONS}
    if unknown:
        print(f"unknown: {', '.join(sorted(unknown))}; --list prints the names", file=sys.stderr)
        return 2
    if broken := failing_laws(None):
        print(f"without any mutation these fail: {', '.join(broken)}", file=sys.stderr)
        return 1
    wanted = [mutation for mutation in MUTATIONS if not chosen or mutation.name in chosen]
    uncaught, never = [], set(laws_there_are())
    print("| mutation | caught by |\n|---|---|")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for mutation, laws in zip(wanted, pool.map(failing_laws, wanted), strict=True):
            never -= set(laws)
            uncaught += [] if laws else [mutation.name]
            print(f"| {mutation.name} | {', '.join(f'`{law[5:]}`' for law in laws) or '**nothing**'} |", flush=True)
    print(f"\n{len(wanted) - len(uncaught)} of {len(wanted)} mutations caught")
    if not chosen:
        print(f"laws that no mutation breaks: {', '.join(sorted(never)) or 'none'}")
    return 1 if uncaught or (never and not chosen) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
