"""Allowed values of settings, as domains with words that can follow "must be"."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Domain:
    """The values that a setting may have.

    Attributes:
      says: the values in words that can follow "must be".
      accepts: whether a plain value is allowed.
    """

    says: str
    accepts: Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Whether a value is a float, or an integer that fits into a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 1e300


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def integer(low: int, high: int | None = None, *, note: str = "") -> Domain:
    """Integers from `low` to `high`, both included. No bool, no float."""
    bounds = f"of at least {low}" if high is None else f"from {low} to {high:,}"
    return Domain(
        f"an integer {bounds}{f' ({note})' if note else ''}",
        lambda value: _is_integer(value) and low <= value and (high is None or value <= high),
    )


def odd_or_zero(*, note: str) -> Domain:
    """Odd positive integers, and 0."""
    return Domain(
        f"an odd positive integer, or 0 ({note})",
        lambda value: _is_integer(value) and value >= 0 and (value == 0 or value % 2 == 1),
    )


def number(
    low: float,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = False,
    infinite: bool = False,
    note: str = "",
) -> Domain:
    """Numbers from `low` to `high`; an open end is excluded. Infinity only with `infinite`."""
    is_bounded = math.isfinite(high)
    if is_bounded:
        says = f"a number in {'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
    elif math.isfinite(low):
        says = f"a number {'above' if low_open else 'of at least'} {low:g}"
    else:
        says = "a number"
    says += ", finite" if not is_bounded and not infinite else ""
    says += f" ({note})" if note else ""

    def accepts(value: Any) -> bool:
        if not _is_number(value) or math.isnan(value) or (math.isinf(value) and not infinite):
            return False
        above = value > low if low_open else value >= low
        return above and (value < high if high_open else value <= high)

    return Domain(says, accepts)


def choice(*names: str) -> Domain:
    """One of several texts."""
    says = _list(names) if len(names) < 3 else f"one of {_list(names)}"
    return Domain(says, lambda value: isinstance(value, str) and value in names)


def text(*, note: str = "", is_empty_allowed: bool = True) -> Domain:
    """Any text."""
    says = ("a text" if is_empty_allowed else "a text that is not empty") + (
        f" ({note})" if note else ""
    )
    return Domain(says, lambda v: isinstance(v, str) and (is_empty_allowed or bool(v.strip())))


BOOLEAN = Domain("True or False", lambda value: isinstance(value, bool))


def many(domain: Domain, *, length: Sequence[int] = (), minimum: int = 0, note: str = "") -> Domain:
    """A tuple of values of one domain.

    Args:
      domain: the domain of each value.
      length: allowed numbers of values; empty for any number.
      minimum: smallest number of values.
      note: words to add to the description.
    """
    if length:
        count = f"{_list([str(n) for n in length])} values"
    else:
        count = f"at least {minimum} values" if minimum > 1 else "values"
    empty = "" if minimum or length else ", or ()"
    says = f"a tuple of {count}, each {domain.says}{empty}" + (f" ({note})" if note else "")
    if minimum == 1:
        says = says.replace("a tuple of values", "a tuple, not empty, of values")
    return Domain(
        says,
        lambda value: (
            isinstance(value, list)
            and len(value) >= minimum
            and (not length or len(value) in length)
            and all(domain.accepts(item) for item in value)
        ),
    )


def interval(low: float, high: float = math.inf) -> Domain:
    """A finite range `(from, to)` with `low < from <= to <= high`."""
    one = number(low, high, low_open=True)
    within = f"in ({low:g}, {high:g}]" if math.isfinite(high) else f"above {low:g}, finite"
    return Domain(
        f"a range (from, to) of two numbers {within}, from at most to",
        lambda value: (
            isinstance(value, list)
            and len(value) == 2
            and all(one.accepts(item) for item in value)
            and value[0] <= value[1]
        ),
    )


def rising(domain: Domain) -> Domain:
    """A tuple of values of one domain, each larger than the one before it."""
    plain_many = many(domain)
    return Domain(
        f"{plain_many.says}, rising",
        lambda value: plain_many.accepts(value) and sorted(set(value)) == value,
    )


def outside_sets() -> Domain:
    """The sets of `ood.outside` and `ood.choice`; each is a mapping."""
    return Domain(
        "a tuple of outside sets (configs/ood.py makes them), or ()",
        lambda value: isinstance(value, list) and all(isinstance(item, dict) for item in value),
    )


def shown(value: Any) -> str:
    """A value in a message; a long one is cut."""
    text = repr(tuple(value) if isinstance(value, list) else value)
    return text if len(text) <= 200 else f"{text[:200]}..."
