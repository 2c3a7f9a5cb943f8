"""Break the package on purpose and see which law notices: `python property_tests/mutations.py [name …]`.

Each mutation replaces one piece of text of one file, in a copy of the package; the laws are run on the copy. The
command ends with 1 if a mutation is not noticed or a law never fails. `--list` prints the names.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
AT_ONCE = 2
COMMAND = ["-m", "pytest", "property_tests", "-m", "not slow", "--hypothesis-profile=mutations", "-q", "-rf"]
# Its laws hold for broken mathematics as well: no mutation here is one of reading hostile bytes.
COMMAND += ["--ignore=property_tests/test_hostile.py"]


class Mutation(NamedTuple):
    """`old`, which `file` of the package holds once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str


# fmt: off
MUTATIONS = [
    Mutation("res transposed", "fn/mhc.py", "zip(res.unbind(-1),", "zip(res.unbind(-2),"),
    Mutation("post dropped", "fn/mhc.py", "mixed = post.unsqueeze(-1) * output", "mixed = post.unsqueeze(-1) ** 0 * output"),
    Mutation("combine in the mappings' dtype", "fn/mhc.py", "return mixed.to(streams.dtype)", "return mixed"),
    Mutation("factor 2 forgotten", "fn/mhc.py", "2 * torch.sigmoid(post), raw", "torch.sigmoid(post), raw"),
    Mutation("bias without gradient", "fn/mhc.py", "a * x + b for a", "a * x + b.detach() for a"),
    Mutation("alphas in another order", "fn/mhc.py", "zip(alpha.unbind(),", "zip(alpha.flip(0).unbind(),"),
    Mutation("pre without sigmoid", "fn/mhc.py", "    pre = torch.sigmoid(pre)\n", ""),
    Mutation("hc without tanh", "fn/mhc.py", "        h = torch.tanh(h)\n", "        h = h.clone()\n"),
    Mutation("norm over all tokens", "fn/mhc.py", "wide.square().mean(-1, keepdim=True)", "wide.square().mean()"),
    Mutation("norm over the sequence", "fn/mhc.py", "wide.square().mean(-1, keepdim=True)", "wide.square().mean((-1, -2)[: wide.dim()], keepdim=True)"),
    Mutation("norm without eps", "fn/mhc.py", "keepdim=True) + eps)\n    # Dividing", "keepdim=True))\n    # Dividing"),
    Mutation("mappings in the streams' dtype", "fn/mhc.py", "    wide = widen(flat)\n", "    wide = flat\n"),
    Mutation("streams summed at the exit", "fn/mhc.py", "widen(streams).mean(-2)", "widen(streams).sum(-2)"),
    Mutation("streams unequal at the entry", "fn/mhc.py", ".repeat_interleave(n, dim=-2)", " * torch.arange(1, n + 1).view(n, 1)"),
    Mutation("learned head without its bias", "fn/mhc.py", "torch.sigmoid(params.alpha * h + params.bias)", "torch.sigmoid(params.alpha * h)"),
    Mutation("pre of the own sub-layer", "fn/block.py", "pre if early is None else early", "pre"),
    Mutation("first pre reads the last stream", "fn/lm.py", "device=x.device) == 0", "device=x.device) == config.mhc_flows - 1"),
    Mutation("residual without mHC doubled", "fn/block.py", "return hidden + branch(hidden), ()", "return 2 * hidden + branch(hidden), ()"),
    Mutation("columns alone", "fn/sinkhorn.py", "torch.log_softmax(torch.log_softmax(log, dim=0), dim=1)", "torch.log_softmax(log, dim=0)"),
    Mutation("rows alone", "fn/sinkhorn.py", "torch.log_softmax(torch.log_softmax(log, dim=0), dim=1)", "torch.log_softmax(log, dim=1)"),
    Mutation("rows first", "fn/sinkhorn.py", "torch.log_softmax(torch.log_softmax(log, dim=0), dim=1)", "torch.log_softmax(torch.log_softmax(log, dim=1), dim=0)"),
    Mutation("a favoured corner", "fn/sinkhorn.py", "_tokens_last(logits), num_iters, eps)", "_tokens_last(logits + torch.eye(logits.shape[-1])), num_iters, eps)"),
    Mutation("raw numbers read by columns", "fn/projections.py", "return sinkhorn_knopp(wide.unflatten(-1, (n, n)),", "return sinkhorn_knopp(wide.unflatten(-1, (n, n)).mT,"),
    Mutation("logits not bounded", "fn/sinkhorn.py", "    log = _bounded(logits)\n    for _", "    log = logits\n    for _"),
    Mutation("logits not bounded in the backward", "fn/sinkhorn.py", "    log = _bounded(logits)\n    if not", "    log = logits\n    if not"),
    Mutation("NaN counts as the largest logit", "fn/sinkhorn.py", "    return logits.clamp(-_limit(logits), _limit(logits))", "    return torch.fmin(logits.clamp(-_limit(logits), _limit(logits)), logits.new_tensor(_limit(logits)))"),
    Mutation("exp of the logits in the backward", "fn/sinkhorn.py", "torch.log_softmax(log, dim=axis)", "(log.exp() / log.exp().sum(axis, keepdim=True)).log()"),
    Mutation("backward of the limit", "fn/sinkhorn.py", "list(_outcomes(logits, num_iters, eps))", "list(_outcomes(logits, num_iters + 100, eps))"),
    Mutation("one iteration fewer in the backward", "fn/sinkhorn.py", "list(_outcomes(logits, num_iters, eps))", "list(_outcomes(logits, max(1, num_iters - 1), eps))"),
    Mutation("backward stops early", "fn/sinkhorn.py", "in reversed(tape):", "in reversed(tape[1:]):"),
    Mutation("eps left out of the backward", "fn/sinkhorn.py", "            g = g * (m / shifted)\n", "            pass\n"),
    Mutation("jvp of one axis", "fn/sinkhorn.py", "t = t - (m * t).sum(axis,", "t = t - (m * t).sum(0,"),
    Mutation("implicit without columns", "fn/sinkhorn.py", "return (wide_g - wide * (u + v.mT)).to(g.dtype)", "return (wide_g - wide * u).to(g.dtype)"),
    Mutation("permutations not normalised", "fn/projections.py", "product(raw.softmax(-1),", "product(raw.sigmoid(),"),
    Mutation("permutations inverted", "fn/projections.py", "float(order[i] == j)", "float(order[j] == i)"),
    Mutation("kronecker with the wrong other", "fn/projections.py", "torch.sigmoid(raw), torch.sigmoid(-raw)", "torch.sigmoid(raw), torch.sigmoid(-raw) * 0.9"),
    Mutation("kronecker factors in another order", "fn/projections.py", "for factor in factors.unbind(-3):", "for factor in factors.flip(-3).unbind(-3):"),
    Mutation("cayley of no skew matrix", "fn/projections.py", "(ones.triu(1) - ones.tril(-1))", "(ones.triu(1) + ones.tril(-1))"),
    Mutation("blocks not averaged", "fn/projections.py", "squares.sum((-3, -1)) / block", "squares.sum((-3, -1))"),
    Mutation("skew numbers not bounded", "fn/projections.py", "raw.double().clamp(-LARGEST_SKEW, LARGEST_SKEW)", "raw.float().square()"),
    Mutation("skew numbers start at zero", "variants.py", "return (t,) * _skew_size(n)", "return (0 * t,) * _skew_size(n)"),
    Mutation("gain in reverse order", "fn/gain.py", "        whole = product(matrix, whole)", "        whole = product(whole, matrix)"),
    Mutation("cumulative gain a layer short", "fn/gain.py", "    while reach < len(res):", "    while reach < len(res) - 1:"),
    Mutation("attention sees the future", "fn/attention.py", "is_causal=True, enable_gqa=q", "is_causal=False, enable_gqa=q"),
    Mutation("forward mode sees the future", "fn/attention.py", "is_causal=True, enable_gqa=True", "is_causal=False, enable_gqa=True"),
    Mutation("a decoded token does not see itself", "fn/decode.py", "device=tokens.device) <= positions", "device=tokens.device) < positions"),
    Mutation("all prompts end where the longest does", "fn/decode.py", "index = (lengths - 1).reshape", "index = (lengths * 0 + x.shape[axis] - 1).reshape"),
    Mutation("the cache is written a place late", "fn/cache.py", ":, places.reshape(-1)] = new", ":, (places.reshape(-1) + 1) % cached.shape[-2]] = new"),
    Mutation("res starts at the identity", "variants.py", "RES_DIAGONAL_INIT = 0.995", "RES_DIAGONAL_INIT = 1 - 1e-15"),
    Mutation("res starts far from the identity", "variants.py", "RES_DIAGONAL_INIT = 0.995", "RES_DIAGONAL_INIT = 0.9"),
    Mutation("pre starts at one half", "params.py", "-math.log(n - 1) if n > 1 else 0.0", "0.0"),
    Mutation("hc starts with a sum", "params.py", "(1 / n,) * n + (1.0,) * n", "(1.0,) * n + (1.0,) * n"),
    Mutation("phi starts at zero", "params.py", "size), std=INIT_STD, decay=True, fp32=True)", "size), decay=True, fp32=True)"),
    Mutation("phi narrow", "params.py", "size), std=INIT_STD, decay=True, fp32=True)", "size), std=INIT_STD, decay=True)"),
    Mutation("alpha decays", "params.py", "mean=PRESETS[config.mhc_preset].alpha, fp32=True)", "mean=PRESETS[config.mhc_preset].alpha, fp32=True, decay=True)"),
    Mutation("noise in the dtype of the weight", "params.py", "generator=generator, dtype=torch.float32", "generator=generator, dtype=dtype"),
    Mutation("head not counted", "params.py", "for spec in tree_leaves(weight_table(config)))", "for spec in tree_leaves(weight_table(config)[:3]))"),
    Mutation("program forgets the aggregate", "program/hyper.py", "g_combine + g_aggregate + g_mappings", "g_combine + g_mappings"),
    Mutation("program forgets the norm of the streams", "program/hyper.py", " - inner * flat", ""),
    Mutation("program forgets the next pre", "program/hyper.py", "Mappings(g_next if early else g_pre,", "Mappings(g_pre,"),
    Mutation("program forgets the skip of the residual", "program/stage.py", "return grads, cotangent + x_cotangent", "return grads, x_cotangent"),
    Mutation("program adds a microbatch twice", "program/gradients.py", "torch._foreach_add_(sums[index], grads)", "torch._foreach_add_(sums[index], grads, alpha=2)"),
    Mutation("duplicate inputs not guarded", "program/compile.py", "        for guard in guards\n", "        if guard.guard_type != \"DUPLICATE_INPUT\" else False\n        for guard in guards\n"),
    Mutation("arguments that are no tensors not guarded", "program/compile.py", "        or _on_argument(guard.orig_guard)\n", ""),
    Mutation("dtypes lost on disk", "checkpoint/tensors.py", "tensor.detach().cpu().contiguous()", "tensor.detach().cpu().contiguous().float()"),
    Mutation("metadata lost on disk", "checkpoint/tensors.py", '"format": "pt", **(metadata', "**(metadata"),
    Mutation("names changed on disk", "checkpoint/tensors.py", "save_file(on_cpu, file,", 'save_file({f"model.{k}": v for k, v in on_cpu.items()}, file,'),
    Mutation("checksums not compared", "checkpoint/tensors.py", "if verify and CHECKSUM in metadata:", "if False:"),
    Mutation("manifest not compared", "checkpoint/run.py", "verify_run(path) if verify else describe_run(path)", "describe_run(path)"),
    Mutation("config lost on disk", "checkpoint/config_files.py", "= build(ModelConfig, fields)", "= build(ModelConfig, fields).replace(norm_eps=1e-5)"),
    Mutation("windows lose a token", "data/packing.py", "start + self.length + 1]", "start + self.length]"),
    Mutation("windows repeat a token", "data/packing.py", "start = (self.first + index) * self.length", "start = max(0, (self.first + index) * self.length - 1)"),
    Mutation("targets are the inputs", "data/packing.py", "window[:-1], window[1:]", "window[:-1], window[:-1]"),
    Mutation("held-out windows overlap", "data/packing.py", "first=whole.first + split", "first=whole.first"),
    Mutation("an epoch draws with replacement", "data/loader.py", ".permutation(count)", ".integers(0, count, count)"),
    Mutation("pre sees what post spreads", "convert/gates.py", "SPREAD * math.sin(angle)", "SPREAD * math.sin(angle + 0.5)"),
    Mutation("readings not compared with one", "convert/plain.py", "(coefficients[..., :count] - 1)", "(0 * coefficients[..., :count])"),
    Mutation("one field for two", "convert/fields.py", '"num_key_value_heads": "num_kv_heads"', '"num_key_value_heads": "num_heads"'),
    Mutation("new adapters are not zero", "fn/lora.py", "torch.zeros(out, rank, dtype=torch.float32, device=weight.device)", "torch.full((out, rank), 0.5, dtype=torch.float32, device=weight.device)"),
    Mutation("adapters of a layer start alike", "fn/lora.py", 'f"{seed}:{name}.{key}"', 'f"{seed}:{name}"'),
    Mutation("a pull without the scale", "fn/lora.py", "scale * product(grad, a.mT)", "product(grad, a.mT)"),
    Mutation("the base scaled with the adapter", "fn/lora.py", "add_product(widen(weight), b, a, scale)", "add_product(0.5 * widen(weight), b, a, scale)"),
]
# fmt: on


def mutate(mutation: Mutation | None, folder: Path) -> None:
    """Copy package and laws into a folder, with the mutation.

    Raises:
        ValueError: when the text that is to be replaced is not there once.
    """
    for name in ("rlm_mhc", "property_tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    if mutation is None:
        return
    file = folder / "rlm_mhc" / mutation.file
    text = file.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name}: its text is {text.count(mutation.old)} times in {mutation.file}, not once")
    file.write_text(text.replace(mutation.old, mutation.new))


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
