"""The list of mutations that shows the laws can fail; `property_tests/mutations.py` runs all of them."""

import ast
import difflib
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
def test_each_mutation_changes_one_statement_of_the_package(mutation):
    source = (mutations.ROOT / "rlm_mhc" / mutation.file).read_text()
    before, after = (ast.unparse(ast.parse(text)) for text in (source, mutations.mutated(source, mutation)))
    changed = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[3:]
    assert [line[0] for line in changed] == ["-", "+"]
    assert mutations.PLACEHOLDER not in after


def mutated(source, old, new, function="f"):
    return mutations.mutated(source, mutations.Mutation("it", "file.py", function, old, new))


def test_a_placeholder_is_one_expression_wherever_it_stands():
    source = "def f(a, b):\n    return (a + b, (a + a) * 2)"
    assert mutated(source, "$x + $x", "3 * $x") == "def f(a, b):\n    return (a + b, 3 * a * 2)"
    assert mutated(source, "$x * 2", "$x.g($x)") == "def f(a, b):\n    return (a + b, (a + a).g(a + a))"


def test_a_mutation_is_of_one_function_whatever_stands_elsewhere():
    source = "class A:\n\n    def f(x):\n        x += 1\n        return x\n\ndef g(x):\n    x += 1"
    assert mutated(source, "$x += 1", "", "A.f").count("x += 1") == 1
    assert "pass\n        return x" in mutated(source, "$x += 1", "", "A.f")


@pytest.mark.parametrize(
    ("function", "old", "words"),
    [
        ("f", "$x + 2", "0 times `$x + 2` in f, not once"),
        ("f", "$x", "times `$x` in f, not once"),
        ("g", "$x", "0 times g in file.py, not once"),
    ],
)
def test_what_is_not_there_once_is_an_error(function, old, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        mutated("def f(x):\n    return x + 1", old, "0", function)


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


def test_an_unknown_name_is_an_error(capsys):
    assert mutations.main(["nonsense"]) == 2
    assert "unknown: nonsense" in capsys.readouterr().err
