"""Validated frozen configs: each field carries its own rule, every error names field, value and what is allowed."""

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
LARGEST = 1 << 63
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def at_least(low: float, default: Any) -> Any:
    """A field of numbers `>= low` (or None where the type allows it)."""
    return _ruled(default, f"a number of at least {low}", lambda x: x >= low)


def positive(default: Any) -> Any:
    """A field of numbers `> 0`."""
    return _ruled(default, "a number above 0", lambda x: x > 0)


def between(low: float, high: float, default: Any) -> Any:
    """A field of numbers in `[low, high]`."""
    return _ruled(default, f"a number from {low} to {high}", lambda x: low <= x <= high)


def one_of(*allowed: str, later: Iterable[str] = (), optional: bool = False) -> Any:
    """A field of names, the default being the first one, or None where it is optional; `later` are known names that
    this version does not have yet."""
    default = None if optional else allowed[0]
    return dataclasses.field(default=default, metadata={"names": allowed, "later": tuple(later)})


def location(default: str | None) -> Any:
    """A field of a path (or None where the type allows it), in which a leading `~` becomes the user's home."""
    return dataclasses.field(default=default, metadata={"path": True})


def some_of(*allowed: str | int) -> Any:
    """A field of a list of names or numbers, at least one, each once, in the order of `allowed`; `all`, the default,
    is all."""
    return dataclasses.field(default=allowed, metadata={"some": allowed})


def section(cls: type[T]) -> T:
    """A nested config with its own defaults; a mapping given in its place is converted."""
    return dataclasses.field(default_factory=cls, metadata={"section": cls})


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest known word, or nothing.

    >>> nearest("hiden_dim", ["hidden_dim", "num_layers"])
    " (did you mean 'hidden_dim'?)"
    """
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{found[0]}'?)" if found else ""


def in_short(error: BaseException, most: int = 200) -> str:
    """The kind of an error and so many characters of what it says, in one line.

    >>> in_short(ValueError("of two\\n  lines"))
    'ValueError: of two lines'
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most]}"


def check(config: Any, prefix: str = "") -> None:
    """Validate every field of a frozen dataclass, turning nested mappings into their sections.

    Raises:
        ValueError: naming the field, the received value and what is allowed.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if cls := field.metadata.get("section"):
            if not isinstance(value, cls):
                object.__setattr__(config, field.name, build(cls, value, name + "."))
            continue
        if allowed := field.metadata.get("some"):
            object.__setattr__(config, field.name, _some(name, value, allowed))
            continue
        value = _typed(name, value, hints[field.name])
        if value is not None and field.metadata.get("path"):
            value = os.path.expanduser(value)
        object.__setattr__(config, field.name, value)
        if value is not None:
            _check_rule(name, value, field.metadata)


def text_fields(cls: type, prefix: str = "") -> list[str]:
    """Return the dotted names of the fields of a config, and of its sections, that hold text.

    >>> from rlm_mhc.config import TrainConfig
    >>> text_fields(TrainConfig)[:3]
    ['optimizer.type', 'scheduler.type', 'mixed_precision']
    """
    hints, names = typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        if section_type := field.metadata.get("section"):
            names += text_fields(section_type, f"{prefix}{field.name}.")
        elif hints[field.name] in (str, str | None):
            names.append(prefix + field.name)
    return names


def build(cls: type[T], values: Any, prefix: str = "") -> T:
    """A config from a mapping, refusing unknown keys with the nearest known one.

    Raises:
        ValueError: on a key the config does not have, or a value its field does not allow.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.')}={values!r}: expected a group of keys, such as {prefix}key=value")
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key '{prefix}{key}'{nearest(str(key), known)}; known are {', '.join(known)}")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def _ruled(default: Any, allowed: str, holds: Callable[[Any], bool]) -> Any:
    return dataclasses.field(default=default, metadata={"allowed": allowed, "holds": holds})


def _check_rule(name: str, value: Any, rule: Mapping[str, Any]) -> None:
    if "names" in rule and value not in rule["names"]:
        allowed = ", ".join(rule["names"])
        if value in rule["later"]:
            raise ValueError(f"{name}={value!r} is planned but not in this version yet; use {allowed}")
        raise ValueError(f"{name}={value!r}: expected one of {allowed}{nearest(value, rule['names'])}")
    if "holds" in rule:
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(math.isfinite(x) and rule["holds"](x) for x in numbers):
            raise ValueError(f"{name}={value!r}: expected {rule['allowed']}")


def _some(name: str, value: Any, allowed: tuple[str | int, ...]) -> tuple[str | int, ...]:
    if value == "all":
        return allowed
    known = [str(item) for item in allowed]
    chosen = [] if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable) else list(value)
    if not chosen:
        raise ValueError(f"{name}={value!r}: expected all, or a list of {', '.join(known)}")
    for item in chosen:
        if item not in allowed:
            raise ValueError(f"{name}={value!r}: expected some of {', '.join(known)}{nearest(str(item), known)}")
    return tuple(item for item in allowed if item in chosen)


def _typed(name: str, value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        options = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if value is None:
            return None
        return _typed(name, value, options[0])
    if typing.get_origin(hint) is tuple:
        size = len(typing.get_args(hint))
        if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable) or len(items := list(value)) != size:
            raise ValueError(f"{name}={value!r}: expected {size} numbers, such as [0.9, 0.95]")
        return tuple(_typed(name, item, float) for item in items)
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise ValueError(f"{name}={str(value)[:20]}…: too large; expected a number below 2⁶³")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        remedy = "; put it in quotes" if hint is str else ""
        raise ValueError(f"{name}={value!r}: expected {KINDS[hint]}, not {type(value).__name__}{remedy}")
    return value
