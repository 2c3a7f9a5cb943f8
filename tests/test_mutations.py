"""The list of mutations that shows the laws can fail; `property_tests/mutations.py` runs all of them."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "property_tests" / "mutations.py"
spec = importlib.util.spec_from_file_location("mutations", FILE)
mutations = sys.modules["mutations"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutations)


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_mutation_still_changes_one_place_and_leaves_python(mutation):
    text = (mutations.ROOT / "rlm_mhc" / mutation.file).read_text()
    assert text.count(mutation.old) == 1
    assert mutation.new != mutation.old
    ast.parse(text.replace(mutation.old, mutation.new))


def test_names_of_mutations_and_of_laws_are_unique():
    files = sorted((mutations.ROOT / "property_tests").glob("test_*.py"))
    laws = [law for file in files for law in re.findall(r"^def (test_\w+)", file.read_text(), re.M)]
    for names in (laws, [mutation.name for mutation in mutations.MUTATIONS]):
        assert len(set(names)) == len(names)


@pytest.mark.slow
def test_a_mutation_is_caught_and_its_absence_is_not():
    transposed = next(m for m in mutations.MUTATIONS if m.name == "res transposed")
    laws = "property_tests/test_mhc.py"
    assert "test_res_sends_stream_j_to_stream_i_untransposed" in mutations.failing_laws(transposed, laws)
    assert mutations.failing_laws(None, laws) == []


def test_a_mutation_whose_text_is_gone_is_an_error(tmp_path):
    gone = mutations.Mutation("gone", "fn/mhc.py", "no such text", "")
    with pytest.raises(ValueError, match=r"0 times in fn/mhc\.py"):
        mutations.mutate(gone, tmp_path)


def test_an_unknown_name_is_an_error(capsys):
    assert mutations.main(["nonsense"]) == 2
    assert "unknown: nonsense" in capsys.readouterr().err
