"""The public lists, and every example in a docstring."""

import doctest
import importlib
import pkgutil

import pytest

import rlm_mhc
from rlm_mhc import fn

CONTRACT = {
    "sinkhorn_knopp",
    "MHCParams",
    "mhc_mappings",
    "MHCMappings",
    "mhc_aggregate",
    "mhc_combine",
    "expand_streams",
    "collapse_streams",
    "composite_gain",
    "init",
    "forward",
    "Batch",
    "loss",
}
MODULES = [m.name for m in pkgutil.walk_packages(rlm_mhc.__path__, "rlm_mhc.")]


def test_public_names_of_the_package():
    assert sorted(rlm_mhc.__all__) == ["ModelConfig", "TrainConfig", "fn", "load_pretrained", "save_pretrained"]


def test_fn_holds_the_contract_and_documents_it():
    assert set(fn.__all__) >= CONTRACT
    assert all(getattr(fn, name).__doc__ for name in fn.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_the_examples_are_there():
    finder = doctest.DocTestFinder()
    found = [t for name in MODULES for t in finder.find(importlib.import_module(name)) if t.examples]
    assert len(found) > 30
