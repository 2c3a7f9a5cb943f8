"""transformers' own tests of any model, taken from its source distribution, which wheels leave out."""

import ast
import importlib
import re
import subprocess
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

from rlm_mhc.model import RLMBackbone, RLMForSequenceClassification, RLMModel
from rlm_mhc.model.config import as_rlm_config
from rlm_mhc.testing import small_config

MEMBER = "tests/test_modeling_common.py"
PACKAGE = "transformers_tests"
CACHE = Path(tempfile.gettempdir(), f"rlm-mhc-{MEMBER.replace('/', '-')}-{transformers.__version__}")

PLACEHOLDER = "a file that holds none of the weights is refused; there all keys are reported as missing"
BOTH_NAMES = "past_key_values is a name of the cache here too, without a warning: before 5.24 transformers has no other"
STUB = "the distribution lacks the generation mixin; tests/model/test_lm.py generates"
SAME_NAMES = "the backbone's names are those on disk: nothing is renamed"
DIFFERENCES = {
    RLMBackbone: {
        "test_bc_cache_name_forward": BOTH_NAMES,
        "test_model_weights_reload_no_missing_tied_weights": PLACEHOLDER,
        "test_reverse_loading_mapping": SAME_NAMES,
    },
    RLMModel: {
        "test_bc_cache_name_forward": BOTH_NAMES,
        "test_generation_tester_mixin_inheritance": STUB,
        "test_model_weights_reload_no_missing_tied_weights": PLACEHOLDER,
    },
    RLMForSequenceClassification: {"test_model_weights_reload_no_missing_tied_weights": PLACEHOLDER},
}


class Tester:
    """The model under test, as the mixin asks for it."""

    batch_size, seq_length, is_training = 2, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def get_config(self):
        config = as_rlm_config(small_config())
        config.pad_token_id = 0
        return config

    def prepare_config_and_inputs_for_common(self):
        tokens = torch.randint(1, 61, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def download() -> None:
    """Fetch the file to its place in the cache; processes that want it at once wait for the first."""
    from filelock import FileLock

    with FileLock(f"{CACHE}.lock", timeout=300):
        if CACHE.exists():
            return
        with tempfile.TemporaryDirectory(dir=CACHE.parent) as folder:
            wanted = ["--no-binary", "transformers", f"transformers=={transformers.__version__}"]
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "0", "--dest", folder]
            done = subprocess.run([*pip, *wanted], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(
                    f"the source distribution of transformers cannot be downloaded: {done.stderr.strip()[-300:]}"
                )
            (archive,) = Path(folder).glob("transformers-*.tar.gz")
            with tarfile.open(archive) as content:
                text = content.extractfile(f"{archive.name.removesuffix('.tar.gz')}/{MEMBER}").read()
            whole = Path(folder, "whole")
            whole.write_bytes(text)
            whole.replace(CACHE)


@pytest.fixture(scope="module")
def mixin(pytestconfig):
    """`ModelTesterMixin`, with empty classes for what its file takes from files that are not distributed."""
    pytest.importorskip("parameterized", reason="transformers' tests need parameterized")
    download()
    source = CACHE.read_text(encoding="utf-8")
    for marker in set(re.findall(r"\bmark\.(\w+)", source)):
        pytestconfig.addinivalue_line("markers", f"{marker}: of transformers")
    stubs = {node.module: node.names for node in ast.walk(ast.parse(source)) if getattr(node, "level", 0)}
    module = ModuleType(f"{PACKAGE}.common")
    module.__file__ = str(CACHE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRANSFORMERS_TEST_DEVICE", "cpu")
        for name, taken in stubs.items():
            stub = ModuleType(f"{PACKAGE}.{name}")
            vars(stub).update({alias.name: type(alias.name, (), {}) for alias in taken})
            patch.setitem(sys.modules, stub.__name__, stub)
        for name in [PACKAGE, *{f"{PACKAGE}.{name.partition('.')[0]}" for name in stubs}]:
            patch.setitem(sys.modules, name, ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        importlib.import_module("transformers.testing_utils")
        exec(compile(source, str(CACHE), "exec"), vars(module))
        yield module.ModelTesterMixin


@pytest.mark.slow
@pytest.mark.parametrize("kind", DIFFERENCES, ids=lambda kind: kind.__name__)
@pytest.mark.usefixtures("no_shape_checks")
def test_it_behaves_as_the_models_of_transformers_do(mixin, kind):
    class Suite(mixin, unittest.TestCase):
        all_model_classes = (kind,)

        def setUp(self):
            self.model_tester = Tester()

    passed, failed = set(), {}
    for name in unittest.TestLoader().getTestCaseNames(Suite):
        result = unittest.TestResult()
        try:
            Suite(name).run(result)
        except pytest.skip.Exception:
            continue
        errors = result.failures + result.errors
        if errors:
            failed[name] = errors[0][1]
        elif not result.skipped:
            passed.add(name)
    unexpected = {name: error for name, error in failed.items() if name not in DIFFERENCES[kind]}
    assert not unexpected, "\n".join(f"{name}: {error}" for name, error in unexpected.items())
    assert failed.keys() == DIFFERENCES[kind].keys()
    assert len(passed) > 80
