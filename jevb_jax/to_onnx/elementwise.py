"""Rules of operations that compute each element by itself."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from jevb_jax import extras
from jevb_jax.to_onnx.graph import Graph, Value
from jevb_jax.to_onnx.rules import Rules, require

with extras.explained():
    from onnx import TensorProto, helper

RULES = Rules()

_FLOAT = {
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
    "logistic": "Sigmoid",
    "erf": "Erf",
    "floor": "Floor",
    "ceil": "Ceil",
}
_NUMBERS = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "max": "Max",
    "min": "Min",
    "neg": "Neg",
    "abs": "Abs",
    "sign": "Sign",
}
_COMPARISONS = {
    "eq": "Equal",
    "lt": "Less",
    "gt": "Greater",
    "le": "LessOrEqual",
    "ge": "GreaterOrEqual",
}
_LOGIC = {"and": "And", "or": "Or", "not": "Not"}


@RULES.of(*_FLOAT, *_NUMBERS)
def _of_numbers(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    name = eqn.primitive.name
    is_float = all(np.issubdtype(one.dtype, np.floating) for one in inputs)
    is_integer = all(one.dtype in (np.int32, np.int64) for one in inputs)
    require(is_float or (name in _NUMBERS and is_integer), eqn, f"is of {inputs[0].dtype}")
    return [graph.elementwise({**_FLOAT, **_NUMBERS}[name], *inputs)]


@RULES.of(*_COMPARISONS)
def _comparison(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    return [graph.elementwise(_COMPARISONS[eqn.primitive.name], *inputs, dtype=np.bool_)]


@RULES.of("ne")
def _not_equal(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    return [graph.elementwise("Not", graph.elementwise("Equal", *inputs, dtype=np.bool_))]


@RULES.of(*_LOGIC)
def _logic(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    require(inputs[0].dtype == np.bool_, eqn, "is of bits")
    return [graph.elementwise(_LOGIC[eqn.primitive.name], *inputs)]


@RULES.of("is_finite")
def _is_finite(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    (x,) = inputs
    outside = [graph.elementwise(name, x, dtype=np.bool_) for name in ("IsNaN", "IsInf")]
    return [graph.elementwise("Not", graph.elementwise("Or", *outside))]


@RULES.of("rsqrt")
def _rsqrt(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    return [graph.elementwise("Reciprocal", graph.elementwise("Sqrt", *inputs))]


@RULES.of("square")
def _square(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    return [graph.elementwise("Mul", inputs[0], inputs[0])]


@RULES.of("integer_pow")
def _integer_pow(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    (x,), power = inputs, int(eqn.params["y"])
    require(power != 0, eqn, "has the exponent 0")
    result = x
    for _ in range(abs(power) - 1):
        result = graph.elementwise("Mul", result, x)
    return [result if power > 0 else graph.elementwise("Reciprocal", result)]


@RULES.of("polynomial")
def _polynomial(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    """The coefficients follow `x`, the constant one first."""
    x, *coefficients = inputs
    *rest, result = coefficients
    for coefficient in reversed(rest):
        product = graph.elementwise("Mul", x, result)
        result = graph.elementwise("Add", product, coefficient)
    return [result]


@RULES.of("log1p")
def _log1p(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    """ONNX has none. `x log(u) / (u - 1)` with `u = 1 + x` has all digits (W. Kahan)."""
    (x,) = inputs
    one = graph.like(x, 1.0)
    u = graph.elementwise("Add", one, x)
    rest = graph.elementwise("Sub", u, one)
    log = graph.elementwise("Log", u)
    quotient = graph.elementwise("Div", log, rest)
    near = graph.elementwise("Mul", x, quotient)
    is_one = graph.elementwise("Equal", u, one, dtype=np.bool_)
    result = graph.elementwise("Where", is_one, x, near)
    is_infinite = graph.elementwise("IsInf", u, dtype=np.bool_)
    return [graph.elementwise("Where", is_infinite, u, result)]


@RULES.of("round")
def _round(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    to_even = lax.RoundingMethod.TO_NEAREST_EVEN
    require(eqn.params["rounding_method"] == to_even, eqn, "does not round to even numbers")
    return [graph.elementwise("Round", *inputs)]


@RULES.of("clamp")
def _clamp(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    low, x, high = inputs
    return [graph.elementwise("Min", graph.elementwise("Max", low, x), high)]


@RULES.of("select_n")
def _select(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    which, *cases = inputs
    require(len(cases) == 2, eqn, f"has {len(cases)} cases")
    if which.dtype != np.bool_:  # the number of the case
        which = graph.node("Cast", which, dims=which.dims, dtype=np.bool_, to=TensorProto.BOOL)
    if cases[0].dtype == np.bool_:  # runtimes have no choice between booleans
        first = graph.elementwise("And", graph.elementwise("Not", which), cases[0])
        second = graph.elementwise("And", which, cases[1])
        return [graph.elementwise("Or", first, second)]
    return [graph.elementwise("Where", which, cases[1], cases[0])]


@RULES.of("convert_element_type")
def _convert(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    (x,), dtype = inputs, np.dtype(eqn.params["new_dtype"])
    if x.dtype == dtype:
        return [x]
    to = helper.np_dtype_to_tensor_dtype(dtype)
    return [graph.node("Cast", x, dims=x.dims, dtype=dtype, to=to)]


@RULES.of("stop_gradient", "copy", "optimization_barrier")
def _identity(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    return list(inputs)


@RULES.of("reduce_precision")
def _reduce_precision(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    """To the nearest power of two; in the middle of two, to the one with an odd exponent."""
    (x,) = inputs
    bits = eqn.params["exponent_bits"], eqn.params["mantissa_bits"]
    if bits == (8, 23):
        return [x]
    require(bits == (8, 0), eqn, f"keeps {bits[1]} bits")

    def binary(name: str, a: Value, b: Value | float) -> Value:
        is_test = name in ("Less", "Greater", "LessOrEqual", "Equal")
        other = b if isinstance(b, Value) else graph.like(x, b)
        return graph.elementwise(name, a, other, dtype=np.bool_ if is_test else np.float32)

    size = graph.elementwise("Abs", x)
    guess = binary("Div", graph.elementwise("Log", size), float(np.log(2)))
    guess = graph.elementwise("Floor", guess)
    guess = binary("Min", binary("Max", guess, -126.0), 127.0)
    low = graph.elementwise("Pow", graph.like(x, 2.0), guess)
    # The logarithm may be wrong by its rounding, so the guess by one.
    half, double = binary("Mul", low, 0.5), binary("Mul", low, 2.0)
    is_high, is_low = binary("Greater", low, size), binary("LessOrEqual", double, size)
    low = graph.elementwise("Where", is_high, half, graph.elementwise("Where", is_low, double, low))
    exponent = graph.elementwise(
        "Where", is_high, binary("Sub", guess, 1.0), graph.elementwise(
            "Where", is_low, binary("Add", guess, 1.0), guess
        )
    )  # fmt: skip
    halves = graph.elementwise("Floor", binary("Mul", exponent, 0.5))
    is_even = binary("Equal", binary("Mul", halves, 2.0), exponent)
    middle = binary("Mul", low, 1.5)
    is_tie = graph.elementwise("And", binary("Equal", size, middle), is_even)
    is_up = graph.elementwise("Or", binary("Greater", size, middle), is_tie)
    result = graph.elementwise("Where", is_up, binary("Mul", low, 2.0), low)
    least = float(np.finfo(np.float32).tiny)
    result = graph.elementwise("Where", binary("Less", size, least), graph.like(x, 0.0), result)
    is_infinite = graph.elementwise("IsInf", x, dtype=np.bool_)
    result = graph.elementwise("Where", is_infinite, size, result)
    is_nan = graph.elementwise("IsNaN", x, dtype=np.bool_)
    result = graph.elementwise("Where", is_nan, x, result)
    return [graph.elementwise("Mul", graph.elementwise("Sign", x), result)]
