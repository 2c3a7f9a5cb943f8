import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlm_mhc import fn
from rlm_mhc.kernels.mix_pre import Settings
from rlm_mhc.kernels.selftest import ARGUMENTS, draw_inputs
from rlm_mhc.testing import kernel_baselines

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
def test_it_measures_everything_side_by_side(recipe, tmp_path):
    result = recipe(
        "benchmark",
        "model.hidden_dim=32",
        "model.num_layers=2",
        "model.vocab_size=64",
        "model.mhc_sinkhorn_iters=2",
        "length=16",
        "batch_size=2",
        "rounds=2",
        "remats=[mhc]",
        "first_step=false",
        "device=cpu",
        f"output_dir={tmp_path}",
    )
    assert result.code == 0, result.err
    (file,) = tmp_path.iterdir()
    measured = json.loads(file.read_text())
    names = [row["name"] for row in measured["rows"]]
    assert names[:3] == ["mHC, remat=mhc", "no mHC", "transformers Llama, compiled"]
    assert all(row["step_ms"] > 0 and row["peak_mib"] > 0 and row["first_step_s"] > 0 for row in measured["rows"])
    assert set(measured["ratios"]) >= {"mHC / no mHC", "no mHC / transformers Llama"}
    assert {"torch", "transformers"} <= measured["versions"].keys()
    assert all(name in result.out for name in names)


def test_every_remat_is_measured_unless_some_are_chosen():
    names = runpy.run_path(str(RECIPES / "benchmark.py"), run_name="recipe")
    batch = fn.Batch(*torch.zeros(2, 1, 8, dtype=torch.int64))
    found = [s.name for s in names["subjects"](names["BenchmarkConfig"](), batch, torch.device("cpu"))]
    assert found[:5] == [
        "mHC, remat=none",
        "mHC, remat=mhc",
        "mHC, remat=full",
        "no mHC",
        "transformers Llama, compiled",
    ]


def test_the_triton_kernels_are_measured_on_a_gpu():
    pytest.importorskip("triton")
    names = runpy.run_path(str(RECIPES / "benchmark.py"), run_name="recipe")
    batch = fn.Batch(*torch.zeros(2, 1, 8, dtype=torch.int64))

    def measured(device, **model):
        run = names["BenchmarkConfig"](model=model)
        return [s.name for s in names["subjects"](run, batch, torch.device(device)) if "Triton" in s.name]

    assert measured("cuda") == [f"mHC, Triton kernels, remat={remat}" for remat in ("none", "mhc", "full")]
    assert not measured("cpu")
    assert not measured("cuda", mhc_preset="hc")  # which they do not serve


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
def test_the_first_step_alone_prints_seconds(recipe):
    small = ["model.hidden_dim=32", "model.num_layers=1", "model.vocab_size=64", "length=16", "device=cpu"]
    result = recipe("benchmark", *small, "only_first_step=true", "model.mhc_enabled=false")
    assert result.code == 0, result.err
    assert float(result.out.strip().splitlines()[-1]) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, the kernels are compiled")
def test_the_kernels_are_run_through_in_the_interpreter(recipe, tmp_path):
    arguments = ["smoke=true", "device=cpu", "dtype=fp32", "iterations=3", "rounds=1", f"output_dir={tmp_path}"]
    result = recipe("benchmark_kernels", *arguments)
    assert result.code == 0, result.err
    written = json.loads((tmp_path / "kernels_cpu_smoke_fp32.json").read_text())
    assert written["smoke"]
    assert not written["tests_passed"]
    assert {size["op"] for size in written["sizes"] if "ours" in size["rows"]} == {*ARGUMENTS}
    assert recipe("benchmark_kernels", *arguments, "ops=[mix_post]").code == 0
    again = json.loads((tmp_path / "kernels_cpu_smoke_fp32.json").read_text())
    assert [size["op"] for size in again["sizes"]] == [*(size["op"] for size in written["sizes"][1:]), "mix_post"]
    # Liger-Kernel is among them where it is installed: its kernels, too, run in the interpreter.
    assert max(row["error"] for size in written["sizes"] for row in size["rows"].values()) < 2e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, the kernels are compiled")
@pytest.mark.usefixtures("no_shape_checks")
def test_the_compiled_reference_is_measured_beside_them_and_compiled_once_for_all_tokens():
    pytest.importorskip("triton")
    names = runpy.run_path(str(RECIPES / "benchmark_kernels.py"), run_name="recipe")
    run = names["KernelsConfig"](dtype="fp32", iterations=2, rounds=1)
    torch._dynamo.utils.counters.clear()  # which other tests of this process have counted in
    for tokens in (5, 9):
        measured = names["measure"](run, "mix_post_pre", 2, 32, tokens, torch.device("cpu"))
        assert measured["rows"].keys() == {"ours", "compiled reference"}
        assert not measured["left_out"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, the kernels are compiled")
def test_a_peer_that_fails_late_is_left_out_and_the_rest_is_measured(monkeypatch):
    pytest.importorskip("triton")
    names = runpy.run_path(str(RECIPES / "benchmark_kernels.py"), run_name="recipe")
    plain = names["reference"]("sub_layer", Settings(2, 1e-6, 0.0))
    calls = iter([1, 2])

    def twice(*inputs):
        next(calls)
        return plain(*inputs)

    def broken(settings):
        raise OSError("libcudnn.so.9: cannot open shared object file")

    as_op = {"peer": names["Implementation"](twice)}.__getitem__
    own = {"PEERS": {"peer": lambda _: "peer", "broken": broken}, "as_op": lambda name, peer: as_op(peer)}
    own["PEER_OPS"] = dict.fromkeys(own["PEERS"], ("sub_layer",))
    for name, value in own.items():
        monkeypatch.setitem(names["main"].__globals__, name, value)
    run = names["KernelsConfig"](dtype="fp32", iterations=2, rounds=1, smoke=True)
    measured = names["measure"](run, "sub_layer", 2, 32, 5, torch.device("cpu"))
    assert measured["rows"].keys() == {"ours"}
    assert measured["left_out"]["peer"].startswith("StopIteration")
    assert measured["left_out"]["broken"].startswith("OSError: libcudnn")


def test_tile_kernels_gets_the_same_problem(tile_kernels, monkeypatch):
    def mhc_pre(
        streams, phi, alpha, bias, *, norm_eps, pre_eps, sinkhorn_eps, mhc_mult, post_mult_value, sinkhorn_repeat
    ):
        raw = tile_kernels.mhc_pre_norm_fn_ref(streams, phi, None, norm_eps)
        pre, post, res = tile_kernels.mhc_pre_split_mixes_ref(raw, alpha, bias, mhc_mult, post_mult_value, pre_eps)
        res = tile_kernels.sinkhorn_normalize_ref(res, sinkhorn_repeat, sinkhorn_eps)
        return tile_kernels.mhc_pre_apply_mix_ref(streams, pre), (post, res)

    functional, post = SimpleNamespace(mhc_pre=mhc_pre), SimpleNamespace(mhc_post=tile_kernels.mhc_post_ref)
    monkeypatch.setitem(sys.modules, "tile_kernels.modeling.mhc.functional", functional)
    monkeypatch.setitem(sys.modules, "tile_kernels.modeling.mhc.ops.post", post)
    for parent in (
        "tile_kernels",
        "tile_kernels.modeling",
        "tile_kernels.modeling.mhc",
        "tile_kernels.modeling.mhc.ops",
    ):
        monkeypatch.setitem(sys.modules, parent, SimpleNamespace())
    names = runpy.run_path(str(RECIPES / "benchmark_kernels.py"), run_name="recipe")
    settings = Settings(20, 1e-6, 0.0)
    peer = kernel_baselines.tile_kernels(settings)
    for name in kernel_baselines.PEER_OPS["TileKernels"]:
        drawn = draw_inputs(name, 4, 32, 7, torch.bfloat16)
        error = names["error"](kernel_baselines.as_op(name, peer), names["reference"](name, settings), drawn)
        assert error < 2e-2  # their references round to bf16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, the kernels are compiled")
@pytest.mark.parametrize("name", kernel_baselines.PEER_OPS["Liger-Kernel"])
def test_liger_kernel_gets_the_same_problem(name):
    pytest.importorskip("liger_kernel")
    names = runpy.run_path(str(RECIPES / "benchmark_kernels.py"), run_name="recipe")
    settings = Settings(3, 1e-6, 0.0)
    op = kernel_baselines.as_op(name, kernel_baselines.liger(settings))
    assert names["error"](op, names["reference"](name, settings), draw_inputs(name, 4, 32, 7, torch.float32)) < 2e-5


def test_the_bytes_of_an_op_are_those_of_its_readme():
    names = runpy.run_path(str(RECIPES / "benchmark_kernels.py"), run_name="recipe")
    n, c, tokens, size, numbers = 4, 64, 10, 2, 20
    forward, backward = names["bytes_to_move"]("mix_post", n, c, tokens, size)
    assert forward == tokens * ((2 * n + 1) * c * size + 4 * numbers)
    assert backward == tokens * ((3 * n + 2) * c * size + 8 * numbers)


def test_kernels_are_not_measured_without_a_gpu(recipe):
    if not torch.cuda.is_available():
        assert "measured on a CUDA device" in recipe("benchmark_kernels").last_error


def test_nonsense_is_one_line(recipe):
    assert "rounds=0" in recipe("benchmark", "rounds=0").last_error
    assert "widths=[100]: expected some of 768, 2048, 4096" in recipe("benchmark_kernels", "widths=[100]").last_error


@pytest.mark.slow
@pytest.mark.usefixtures("no_shape_checks")
def test_decoding_is_measured_beside_llama(recipe, tmp_path):
    model = ["model.hidden_dim=32", "model.num_layers=1", "model.vocab_size=64", "model.mhc_flows=2"]
    sizes = ["prompt=3", "new_tokens=4", "cache_size=8", "rounds=2", "device=cpu"]
    result = recipe("benchmark", "decode", *model, *sizes, f"output_dir={tmp_path}")
    assert result.code == 0, result.err
    measured = json.loads((tmp_path / "benchmark_decode_cpu_32x1.json").read_text())
    assert [row["name"] for row in measured["rows"]] == ["mHC", "no mHC", "transformers Llama, static cache"]
    assert all(row["tokens_per_s"] > 0 for row in measured["rows"])
    assert measured["rows"][2]["ratio_to_llama"] == 1
    assert measured["command"].startswith("python recipes/benchmark.py decode model.hidden_dim=32")


def test_a_cache_too_small_to_measure_in_is_one_line(recipe):
    assert "cache_size=8: no room for" in recipe("benchmark_decode", "cache_size=8").last_error
