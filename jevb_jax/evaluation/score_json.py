"""Fitted scores as plain JSON and arrays, without code.

A fitted score is a tree of dataclasses and named tuples of `jevb_jax`, arrays, functions of the
same modules, and plain values. JSON stores the names of our classes and functions. Reading builds
only these, and accepts a field only if its class has it.
"""

import dataclasses
import functools
import importlib
import re
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

_PACKAGE = "jevb_jax."
# Only names in these folders are looked up, so a file cannot make us run any other code.
_HOMES = re.compile(r"(evaluation|paper)\.[a-z_]+")
# Where the contents of split or moved modules are now. Older detectors hold the old names.
_FORMERLY: dict[str, tuple[str, ...]] = {
    "ood": (
        "paper.scores",
        "evaluation.detector_input",
        "evaluation.neighbor_detectors",
        "evaluation.gaussian_detectors",
        "evaluation.labeled_detectors",
    ),
    "ood_protocol": ("evaluation.score_table",),
    "mixture": ("evaluation.mixture",),
    "classification": ("evaluation.linear_probe",),
    "features": ("evaluation.features",),
}


class SavedScoreError(ValueError):
    """The description is not that of a fitted score of this version."""


def describe(score: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Describes a fitted score by JSON values and arrays.

    Args:
      score: from an entry of `score_table.score_table`, or from a `fit_*` function of the
        detectors.

    Returns:
      JSON values, which name classes, functions and arrays, and these arrays by name.

    Raises:
      TypeError: a part has no name in our modules, for example a local function.
    """
    arrays: dict[str, np.ndarray] = {}
    return _describe(score, "score", arrays), arrays


def rebuild(description: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Builds the score that `describe` described.

    Args:
      description: JSON values.
      arrays: exactly the arrays that the description names.

    Returns:
      The score. Its device arrays are on the default device.

    Raises:
      SavedScoreError: this version lacks a class, function or field, or an array is missing or
        left over.
    """
    used: set[str] = set()
    score = _rebuild(description, arrays, used)
    left = sorted(set(arrays) - used)
    if left:
        raise SavedScoreError(f"no part of the score names these arrays: {left}")
    return score


def _describe(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return {"float": repr(float(value))}  # JSON has no infinity
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        arrays[name] = np.array(value, order="C")
        return {"array": name, "on": "device" if isinstance(value, jax.Array) else "host"}
    if isinstance(value, functools.partial):
        parts = {"function": value.func, "arguments": value.args, "keywords": value.keywords}
        kind = "partial" if isinstance(value, Partial) else "plain_partial"
        return {kind: _describe_all(parts, name, arrays)}
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType) or _is_compiled(value):
        return {"function": _name_of(value, value)}
    if dataclasses.is_dataclass(value) or hasattr(value, "_fields"):
        fields = {field: getattr(value, field) for field in _fields(type(value))}
        return {
            "class": _name_of(type(value), value),
            "fields": _describe_all(fields, name, arrays),
        }
    if isinstance(value, tuple | list):
        items = _describe_all({str(i): item for i, item in enumerate(value)}, name, arrays)
        return {"tuple" if isinstance(value, tuple) else "list": list(items.values())}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"mapping": _describe_all(value, name, arrays)}
    raise TypeError(
        f"{name} of a score cannot be saved: {value!r} is neither numbers nor a part of jevb_jax"
    )


def _describe_all(
    values: Mapping[str, Any], name: str, arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    return {key: _describe(value, f"{name}.{key}", arrays) for key, value in values.items()}


def _is_compiled(value: Any) -> bool:
    """Whether a value is a function compiled by `jax.jit`."""
    return callable(value) and isinstance(getattr(value, "__wrapped__", None), types.FunctionType)


def _fields(owner: type) -> tuple[str, ...]:
    if dataclasses.is_dataclass(owner):
        return tuple(field.name for field in dataclasses.fields(owner))
    fields: Any = getattr(owner, "_fields", ())
    return tuple(fields)


def _name_of(named: Any, value: Any) -> str:
    module, name = named.__module__, named.__qualname__
    home = module.removeprefix(_PACKAGE)
    if not _HOMES.fullmatch(home) or getattr(_module(module), name, None) is not named:
        raise TypeError(
            f"a score cannot be saved: {value!r} is not defined at the top of a module of "
            "jevb_jax.evaluation or jevb_jax.paper"
        )
    return f"{home}:{name}"


def _module(name: str) -> types.ModuleType:
    return importlib.import_module(name)


def _named(name: Any) -> Any:
    """The class or function that a description names; it must be defined in one of our modules."""
    if not isinstance(name, str) or not re.fullmatch(r"[a-z_.]+:\w+", name):
        raise SavedScoreError(f"expected the name of a class or function, got {name!r}")
    module_name, _, attribute = name.partition(":")
    candidates = _FORMERLY.get(module_name, (module_name,))
    if not all(_HOMES.fullmatch(candidate) for candidate in candidates):
        raise SavedScoreError(f"{name} is not in jevb_jax.evaluation or jevb_jax.paper")
    for candidate in candidates:
        try:
            module = _module(_PACKAGE + candidate)
        except ImportError as error:
            raise SavedScoreError(f"this version has no {_PACKAGE}{candidate}") from error
        found = getattr(module, attribute, None)
        if found is not None and getattr(found, "__module__", "") == _PACKAGE + candidate:
            return found
    raise SavedScoreError(f"this version has no {attribute} in {_PACKAGE}{module_name}")


def _rebuild(description: Any, arrays: Mapping[str, np.ndarray], used: set[str]) -> Any:
    if description is None or isinstance(description, bool | int | str):
        return description
    if not isinstance(description, dict) or not description:
        raise SavedScoreError(f"expected a part of a score, got {description!r}")
    kind, content = next(iter(description.items()))

    def all_of(values: Any) -> dict[str, Any]:
        return {key: _rebuild(value, arrays, used) for key, value in values.items()}

    match kind:
        case "float":
            return float(content)
        case "array":
            if content not in arrays:
                raise SavedScoreError(f"the array {content} is missing")
            used.add(content)
            array = arrays[content]
            return jnp.asarray(array) if description["on"] == "device" else array
        case "partial" | "plain_partial":
            parts = all_of(content)
            make = Partial if kind == "partial" else functools.partial
            return make(parts["function"], *parts["arguments"], **parts["keywords"])
        case "function":
            found = _named(content)
            if isinstance(found, type):
                raise SavedScoreError(f"{content} is a class, not a function")
            return found
        case "class":
            owner = _named(content)
            if not isinstance(owner, type) or not _fields(owner):
                raise SavedScoreError(f"{content} is neither a dataclass nor a named tuple")
            fields = all_of(description["fields"])
            if set(fields) != set(_fields(owner)):
                raise SavedScoreError(
                    f"{content} has the fields {list(_fields(owner))} in this version, but was saved "
                    f"with {list(fields)}. Fit and save the detector again"
                )
            return owner(**fields)
        case "tuple" | "list":
            items = [_rebuild(value, arrays, used) for value in content]
            return tuple(items) if kind == "tuple" else items
        case "mapping":
            return all_of(content)
        case _:
            raise SavedScoreError(f"expected a part of a score, got {kind!r}")
