"""A recipe's command line: Hydra in front, one readable line of error behind."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlm_mhc.train.device import MEMORY_ADVICE
from rlm_mhc.train.safe_stream import install_safe_streams, visible
from rlm_mhc.train.signals import ignore_saving
from rlm_mhc.validation import build, nearest, text_fields

T = TypeVar("T")
# Values of text fields that Hydra reads, and those that it reads in a sweep.
MEANT = re.compile(r"""^null$|\$\{|^(['"]).*\1$""", re.DOTALL)
SWEPT = re.compile(MEANT.pattern + r"|,|^(choice|range|interval|glob)\(", re.DOTALL)


def command(
    config_type: type[T],
    script: str,
    main: Callable[[T], int | None],
    complete: Callable[[dict[str, Any]], Mapping[str, Any]] = dict,
    texts: Collection[str] = (),
) -> None:
    """Run `main(config)` with the config that Hydra composes for a recipe, and exit.

    Args:
        config_type: the validated dataclass that `main` receives.
        script: the recipe's `__file__`; its config is `configs/<name>.yaml` beside it.
        main: the recipe; what it returns is the exit code.
        complete: what the config is built from, given the values that Hydra composed.
        texts: keys whose values are any text, taken as it stands: to Hydra, `a, b` and `f(x)` are more than that.

    A mistake of the user's ends with exit code 2 and `error: …` as the last line of stderr; `debug=true` adds the
    traceback. Whatever else goes wrong keeps its traceback. What is said to a full disk or a pipe that nobody reads is
    lost, and ends nothing; nor does a SIGUSR1 while there is nothing to save.
    """
    import hydra
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    install_safe_streams()
    ignore_saving()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints errors its own way and exits
    folder, name = Path(script).resolve().parent / "configs", Path(script).stem
    debug = "debug=true" in map(str.lower, sys.argv)
    composed: list[Any] = []
    given, rest = split_texts(sys.argv[1:], texts)
    sys.argv[1:] = quote_texts(rest, text_fields(config_type))

    @hydra.main(version_base="1.3", config_path=str(folder), config_name=name)
    def compose(config: DictConfig) -> None:
        composed.append({**OmegaConf.to_container(config, resolve=True), **given})

    try:
        compose()
        # More than one with --multirun; none where Hydra was asked for help or the config alone.
        codes = [main(build(config_type, complete(values))) or 0 for values in composed]
        sys.exit(max(codes, default=0))
    except KeyboardInterrupt:
        fail("interrupted", 130, debug)
    except (hydra.errors.HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        fail(_explain(error, folder, name), 2, debug)
    except (ValueError, OSError) as error:
        fail(_one_line(error), 2, debug)
    except MemoryError as error:
        fail(f"out of memory ({error}); {MEMORY_ADVICE}", 3, debug)
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        fail(f"out of memory ({_one_line(error)[:200]}); {MEMORY_ADVICE}", 3, debug)


def split_texts(arguments: Sequence[str], texts: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The values of those keys, as they were typed, and the other arguments.

    >>> split_texts(["prompt=Hello, world", "seed=1"], ["prompt"])
    ({'prompt': 'Hello, world'}, ['seed=1'])
    """
    pairs = [argument.partition("=") for argument in arguments]
    given = {key: value for key, equals, value in pairs if equals and key in texts}
    return given, ["".join(pair) for pair in pairs if not (pair[1] and pair[0] in texts)]


def quote_texts(arguments: Sequence[str], keys: Collection[str]) -> list[str]:
    """Put the values of text fields in quotes, where Hydra would read a number, a list or a function.

    What is meant for Hydra stays: `null`, a value in quotes, an interpolation, and the choices of a sweep.

    >>> quote_texts(["output_dir=2026_11_25", "+name=a,b", "seed=1"], ["output_dir", "name"])
    ["output_dir='2026_11_25'", "+name='a,b'", 'seed=1']
    """
    from hydra.core.override_parser.types import Quote, QuotedString

    hydra_reads = SWEPT if {"-m", "--multirun"} & set(arguments) else MEANT
    quoted = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name.lstrip("+") in keys and not hydra_reads.search(value):
            argument = f"{name}={QuotedString(value, Quote.single).with_quotes()}"
        quoted.append(argument)
    return quoted


def fail(message: str, code: int, debug: bool = False) -> None:
    """Say what went wrong in the last line of stderr, and exit."""
    if debug:
        traceback.print_exc()
    sys.stdout.flush()
    print(f"error: {visible(message)}", file=sys.stderr, flush=True)
    sys.exit(code)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _out_of_memory(error: RuntimeError) -> bool:
    return "out of memory" in str(error).lower() or "can't allocate memory" in str(error).lower()


def _explain(error: Exception, folder: Path, name: str) -> str:
    """Hydra's and OmegaConf's errors in one line, with the nearest valid key or choice."""
    from hydra.errors import OverrideParseException

    # What follows a blank line is Hydra's search path.
    text = " ".join(str(error).split("\nConfig search path")[0].split())
    if found := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(found[1], folder, name)
    if found := re.search(r"Could not find '([^']+)' Available options in '([^']+)': (.*)", text):
        group, choice, options = found[2], found[1].rsplit("/", 1)[-1], found[3].split()
        return f"{group}={choice}: expected one of {', '.join(options)}{nearest(choice, options)}"
    if found := re.search(r"Could not override '?([\w./]+)'?.* No match in the defaults list", text):
        return _unknown_key(found[1], folder, name)
    if isinstance(error, OverrideParseException):
        return f"cannot read the argument '{error.override}'; write key=value, with quotes around unusual values"
    return text


def _unknown_key(key: str, folder: Path, name: str) -> str:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
        known = list(_leaf_keys(compose(name)))
    return f"unknown key '{key}'{nearest(key, known)}; recipes/configs/{name}.yaml lists them all"


def _leaf_keys(config: Any, prefix: str = "") -> Iterable[str]:
    for key, value in config.items():
        yield prefix + key
        if hasattr(value, "items"):
            yield from _leaf_keys(value, f"{prefix}{key}.")
