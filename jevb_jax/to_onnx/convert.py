"""Writes a function of JAX as an ONNX graph with any batch size.

JAX traces the function with an unknown batch size. Each operation of the trace is written by its
rule in `elementwise` or `arrays`. What depends on no input is computed here, by JAX: constants such as
`lgamma(df)` need no operator of ONNX.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import numpy as np
from jax.typing import DTypeLike

from jevb_jax.to_onnx import arrays, elementwise
from jevb_jax.to_onnx.graph import ConversionError, Graph, Value, constant, is_static
from jevb_jax.to_onnx.rules import Rule, check_dims

RULES: dict[str, Rule] = {**elementwise.RULES, **arrays.RULES}
BATCH = "b"
# A loop is written step by step.
_MOST_STEPS = 256
# Operations that hold the whole function that they call, by the name of this parameter.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}


def to_onnx(
    function: Callable[[Any], Mapping[str, Any]],
    *,
    input_name: str,
    shape: Sequence[int],
    dtype: DTypeLike,
    metadata: Mapping[str, str],
    producer: tuple[str, str],
) -> bytes:
    """The bytes of an ONNX file that computes a function, for any batch size.

    Args:
      function: takes one array `[b, *shape]`; returns arrays by name.
      input_name: name of its input in the file.
      shape: dimensions of one example.
      dtype: type of the input.
      metadata: texts that are stored in the file, by name.
      producer: name and version of the program, stored in the file.

    Raises:
      ConversionError: the function has a part that cannot be written; the message names it.
      ModuleNotFoundError: the package onnx is not installed.
    """
    (batch,) = jax.export.symbolic_shape(BATCH)
    example = jax.ShapeDtypeStruct((batch, *shape), dtype)
    graph = Graph(batch, batch_of=input_name)
    given = Value(example.shape, np.dtype(dtype), name=input_name)
    # An accelerator would compute products of constants with fewer digits.
    with jax.default_matmul_precision("highest"):
        closed, outputs = jax.make_jaxpr(function, return_shape=True)(example)
        found = _run(graph, closed.jaxpr, [constant(one) for one in closed.consts], [given])
    whole = [
        graph.full(value, atom.aval.shape)
        for value, atom in zip(found, closed.jaxpr.outvars, strict=True)
    ]
    # The outputs of a dict come in the order of its sorted names.
    return graph.model(
        [(input_name, example.shape, dtype)],
        list(zip(sorted(outputs), whole, strict=True)),
        metadata=dict(metadata),
        producer=producer,
    )


def _run(
    graph: Graph, jaxpr: Any, constants: Sequence[Value], inputs: Sequence[Value]
) -> list[Value]:
    """Writes a traced function for given inputs, and returns its outputs."""
    known: dict[Any, Value] = dict(zip(jaxpr.constvars, constants, strict=True))
    known |= zip(jaxpr.invars, inputs, strict=True)

    def read(atom: Any) -> Value:
        return (
            constant(np.asarray(atom.val, atom.aval.dtype)) if hasattr(atom, "val") else known[atom]
        )

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        outputs = _outputs(graph, eqn, values)
        for atom, value in zip(eqn.outvars, outputs, strict=True):
            check_dims(value, atom.aval.shape, eqn.primitive.name)
            known[atom] = value
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(graph: Graph, eqn: Any, inputs: Sequence[Value]) -> list[Value]:
    """Writes one operation of a trace, or computes it if its inputs are constants."""
    name = eqn.primitive.name
    if name in _CALLS:
        return _called(graph, eqn.params[_CALLS[name]], inputs)
    if name == "scan":
        return _scan(graph, eqn, inputs)
    if name == "dim_as_value":
        raise ConversionError("it computes with the batch size")
    shapes = [atom.aval.shape for atom in (*eqn.invars, *eqn.outvars)]
    is_known = all(one.constant is not None for one in inputs) and all(map(is_static, shapes))
    if is_known and name != "broadcast_in_dim":  # its rule makes no copies
        return _computed(eqn, inputs)
    if name not in RULES:
        raise ConversionError(f"its operation {name} is not among those that we write")
    return RULES[name](graph, inputs, eqn)


def _called(graph: Graph, function: Any, inputs: Sequence[Value]) -> list[Value]:
    """Writes a function that is called where it is called; `function` may hold constants."""
    constants = [constant(one) for one in getattr(function, "consts", ())]
    return _run(graph, getattr(function, "jaxpr", function), constants, inputs)


def _computed(eqn: Any, inputs: Sequence[Value]) -> list[Value]:
    """What an operation gives for constants."""
    arrays = [
        np.broadcast_to(np.asarray(value.constant), atom.aval.shape)
        for value, atom in zip(inputs, eqn.invars, strict=True)
    ]
    found = eqn.primitive.bind(*arrays, **eqn.params)
    return [constant(one) for one in (found if eqn.primitive.multiple_results else [found])]


def _scan(graph: Graph, eqn: Any, inputs: Sequence[Value]) -> list[Value]:
    """Writes every step of a loop after each other."""
    params = eqn.params
    length, body = params["length"], getattr(params["jaxpr"], "jaxpr", params["jaxpr"])
    # The names of further parameters change with JAX's version. Rows have one more axis than the
    # step sees.
    num_rows = _num_longer(eqn.invars, body.invars)
    num_carry = len(body.outvars) - _num_longer(eqn.outvars, body.outvars)
    num_consts = len(body.invars) - num_rows - num_carry
    if not isinstance(length, int) or not 1 <= length <= _MOST_STEPS:
        raise ConversionError(f"it has a loop of {length} steps; at most {_MOST_STEPS} are written")
    fixed, carry = inputs[:num_consts], list(inputs[num_consts : num_consts + num_carry])
    rows = inputs[num_consts + num_carry :]
    outputs: list[list[Value]] = []
    for step in reversed(range(length)) if params["reverse"] else range(length):
        of_step = [_row(graph, one, step) for one in rows]
        found = _called(graph, params["jaxpr"], [*fixed, *carry, *of_step])
        carry = found[:num_carry]
        outputs.append(found[num_carry:])
    if params["reverse"]:
        outputs.reverse()
    stacked = []
    for atom, steps in zip(eqn.outvars[num_carry:], zip(*outputs, strict=True), strict=False):
        dims, dtype = atom.aval.shape, atom.aval.dtype
        parts = [graph.full(graph.reshape(one, (1, *one.dims)), (1, *dims[1:])) for one in steps]
        stacked.append(graph.node("Concat", *parts, dims=dims, dtype=dtype, axis=0))
    return [*carry, *stacked]


def _num_longer(whole: Sequence[Any], of_step: Sequence[Any]) -> int:
    """How many arrays of a loop have one more axis than those of a step."""
    pairs = zip(whole, of_step, strict=True)
    return sum(len(one.aval.shape) > len(other.aval.shape) for one, other in pairs)


def _row(graph: Graph, value: Value, index: int) -> Value:
    """One element along the first axis."""
    if value.dims[0] == 1:
        index = 0  # the same in every step
    if value.constant is not None:
        return constant(value.constant[index])
    dims = value.dims[1:]
    place = constant(np.array(index, np.int64))
    return graph.node("Gather", value, place, dims=dims, dtype=value.dtype, axis=0)
