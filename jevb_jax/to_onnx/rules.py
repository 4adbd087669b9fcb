"""What the rules share that write operations of JAX in ONNX.

A rule gets the graph, the inputs as values, and the equation of JAX. It returns the outputs. A rule
that could be wrong for other parameters refuses them.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jevb_jax.to_onnx.graph import ConversionError, Graph, Value

Rule = Callable[[Graph, Sequence[Value], Any], list[Value]]


class Rules(dict[str, Rule]):
    """Rules by the name of the operation in JAX."""

    def of(self, *names: str) -> Callable[[Rule], Rule]:
        """Decorates the rule of some operations."""

        def register(function: Rule) -> Rule:
            self.update(dict.fromkeys(names, function))
            return function

        return register


def require(condition: Any, eqn: Any, what: str) -> None:
    """Raises ConversionError, which names the operation, unless a condition holds."""
    if not condition:
        raise ConversionError(f"its operation {eqn.primitive.name} {what}")


def whole(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    """The inputs, each with all of its dimensions."""
    return [
        graph.full(value, atom.aval.shape) for value, atom in zip(inputs, eqn.invars, strict=True)
    ]


def output(eqn: Any, number: int = 0) -> tuple[tuple[Any, ...], Any]:
    """Dimensions and type of an output."""
    aval = eqn.outvars[number].aval
    return aval.shape, aval.dtype


def check_dims(value: Value, dims: Sequence[Any], name: str) -> None:
    """Raises ConversionError unless a value has these dimensions, or 1 where it is broadcast."""
    fits = len(value.dims) == len(dims) and all(
        have == want or have == 1 for have, want in zip(value.dims, dims, strict=True)
    )
    if not fits:
        raise ConversionError(f"its operation {name} gives {value.dims} in place of {tuple(dims)}")
