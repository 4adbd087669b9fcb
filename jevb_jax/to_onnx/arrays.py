"""Rules of operations on whole arrays: shapes, sums, products, order and search."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jevb_jax import extras
from jevb_jax.to_onnx.graph import Graph, Value, constant
from jevb_jax.to_onnx.rules import Rules, output, require, whole

with extras.explained():
    from onnx import TensorProto

RULES = Rules()


# --- Shapes ---------------------------------------------------------------------------------------


@RULES.of("broadcast_in_dim")
def _broadcast(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    """Only axes are added. Who needs the copies makes them (`Graph.full`)."""
    dims = [1] * len(eqn.params["shape"])
    for axis, dim in zip(eqn.params["broadcast_dimensions"], inputs[0].dims, strict=True):
        dims[axis] = dim
    return [graph.reshape(inputs[0], dims)]


@RULES.of("reshape")
def _reshape(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    require(eqn.params.get("dimensions") is None, eqn, "also changes the order of the axes")
    (x,) = whole(graph, inputs, eqn)
    return [graph.reshape(x, output(eqn)[0])]


@RULES.of("squeeze")
def _squeeze(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    (x,) = inputs
    gone = eqn.params["dimensions"]
    return [graph.reshape(x, [dim for axis, dim in enumerate(x.dims) if axis not in gone])]


@RULES.of("transpose")
def _transpose(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    return [graph.transpose(inputs[0], eqn.params["permutation"])]


@RULES.of("concatenate")
def _concatenate(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    dims, dtype = output(eqn)
    parts = whole(graph, inputs, eqn)
    axis = int(eqn.params["dimension"])
    return [graph.node("Concat", *parts, dims=dims, dtype=dtype, axis=axis)]


@RULES.of("slice")
def _slice(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    (x,) = whole(graph, inputs, eqn)
    strides = eqn.params["strides"] or (1,) * len(x.dims)
    asked = zip(
        eqn.params["start_indices"], eqn.params["limit_indices"], strides, x.dims, strict=True
    )
    parts = [
        (axis, start, limit, step)
        for axis, (start, limit, step, dim) in enumerate(asked)
        if not (step == 1 and isinstance(start, int) and start == 0 and limit == dim)
    ]
    if not parts:
        return [x]
    for part in parts:
        require(all(isinstance(one, int) for one in part), eqn, "depends on the batch size")
    dims, dtype = output(eqn)
    axes, starts, ends, steps = (
        constant(np.array(one, np.int64)) for one in zip(*parts, strict=True)
    )
    return [graph.node("Slice", x, starts, ends, axes, steps, dims=dims, dtype=dtype)]


# --- Sums, products and the like ------------------------------------------------------------------

_REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}


@RULES.of(*_REDUCTIONS, "reduce_or", "reduce_and")
def _reduce(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    (x,) = whole(graph, inputs, eqn)
    name = eqn.primitive.name
    dims, dtype = output(eqn)
    axes = constant(np.array(eqn.params["axes"], np.int64))
    if not len(axes.constant if axes.constant is not None else ()):
        return [x]
    if name in _REDUCTIONS:
        require(x.dtype in (np.float32, np.int32, np.int64), eqn, f"is of {x.dtype}")
        return [graph.node(_REDUCTIONS[name], x, axes, dims=dims, dtype=dtype, keepdims=0)]
    require(x.dtype == np.bool_, eqn, "is of bits")
    numbers = graph.node("Cast", x, dims=x.dims, dtype=np.int32, to=TensorProto.INT32)
    operator = "ReduceMax" if name == "reduce_or" else "ReduceMin"
    found = graph.node(operator, numbers, axes, dims=dims, dtype=np.int32, keepdims=0)
    return [graph.node("Cast", found, dims=dims, dtype=np.bool_, to=TensorProto.BOOL)]


@RULES.of("dot_general")
def _dot(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    dims, dtype = output(eqn)
    require(all(one.dtype == np.float32 for one in inputs), eqn, f"is of {inputs[0].dtype}")
    require(dtype == np.float32, eqn, f"gives {dtype}")
    (of_left, of_right), (batch_left, batch_right) = eqn.params["dimension_numbers"]
    left, right = whole(graph, inputs, eqn)
    if not batch_left and len(of_left) == 1 and len(right.dims) == 2:
        rest = [axis for axis in range(len(left.dims)) if axis != of_left[0]]
        left = graph.transpose(left, [*rest, of_left[0]])
        right = graph.transpose(right, [of_right[0], 1 - of_right[0]])
        return [graph.node("MatMul", left, right, dims=dims)]
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    names = {axis: next(letters) for axis in range(len(left.dims))}
    shared = dict(zip((*batch_right, *of_right), (*batch_left, *of_left), strict=True))
    others = {
        axis: names[shared[axis]] if axis in shared else next(letters)
        for axis in range(len(right.dims))
    }
    result = [names[axis] for axis in batch_left]
    result += [names[axis] for axis in names if axis not in (*batch_left, *of_left)]
    result += [others[axis] for axis in others if axis not in shared]
    terms = "".join(names.values()), "".join(others.values()), "".join(result)
    equation = f"{terms[0]},{terms[1]}->{terms[2]}"
    return [graph.node("Einsum", left, right, dims=dims, equation=equation)]


@RULES.of("conv_general_dilated")
def _convolution(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    params = eqn.params
    dims, dtype = output(eqn)
    require(all(one.dtype == np.float32 for one in inputs), eqn, f"is of {inputs[0].dtype}")
    require(dtype == np.float32, eqn, f"gives {dtype}")
    require(params["batch_group_count"] == 1, eqn, "has groups of the batch")
    require(all(one == 1 for one in params["lhs_dilation"]), eqn, "is a transposed one")
    of_left, of_right, of_output = params["dimension_numbers"]
    left, right = whole(graph, inputs, eqn)
    padding = params["padding"]
    pads = [int(low) for low, _ in padding] + [int(high) for _, high in padding]
    require(min(pads, default=0) >= 0, eqn, "has a negative padding")
    found = graph.node(
        "Conv",
        graph.transpose(left, of_left),
        graph.transpose(right, of_right),
        dims=[dims[axis] for axis in of_output],
        strides=[int(one) for one in params["window_strides"]],
        dilations=[int(one) for one in params["rhs_dilation"]],
        pads=pads,
        group=int(params["feature_group_count"]),
    )
    return [graph.transpose(found, np.argsort(of_output).tolist())]


@RULES.of("reduce_window_max")
def _max_pool(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    params = eqn.params
    (x,) = whole(graph, inputs, eqn)
    require(x.dtype == np.float32, eqn, f"is of {x.dtype}")
    dilations = (*params["base_dilation"], *params["window_dilation"])
    require(all(one == 1 for one in dilations), eqn, "is dilated")
    window = params["window_dimensions"]
    inner = [axis for axis, size in enumerate(window) if size != 1]
    outer = [axis for axis in range(len(window)) if axis not in inner]
    strides, padding = params["window_strides"], params["padding"]
    plain = all(strides[axis] == 1 and tuple(padding[axis]) == (0, 0) for axis in outer)
    require(plain and len(outer) == 2 and inner, eqn, "is none over height and width")
    order = [*outer, *inner]
    dims, dtype = output(eqn)
    found = graph.node(
        "MaxPool",
        graph.transpose(x, order),
        dims=[dims[axis] for axis in order],
        dtype=dtype,
        kernel_shape=[int(window[axis]) for axis in inner],
        strides=[int(strides[axis]) for axis in inner],
        pads=[int(padding[axis][end]) for end in (0, 1) for axis in inner],
    )
    return [graph.transpose(found, np.argsort(order).tolist())]


# --- Order and search -----------------------------------------------------------------------------


def _largest(
    graph: Graph, x: Value, count: int, axis: int, *, largest: bool = True
) -> tuple[Value, Value]:
    """The largest or smallest elements along an axis, in order, and their places."""
    dims = [count if number == axis else dim for number, dim in enumerate(x.dims)]
    values, places = graph.nodes_of(
        "TopK",
        x,
        constant(np.array([count], np.int64)),
        outputs=[(dims, x.dtype), (dims, np.int64)],
        axis=axis,
        largest=int(largest),
        sorted=1,
    )
    return values, places


@RULES.of("top_k")
def _top_k(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    (x,) = whole(graph, inputs, eqn)
    require(x.dtype == np.float32, eqn, f"is of {x.dtype}")
    axis = int(eqn.params.get("axis", -1)) % len(x.dims)
    values, places = _largest(graph, x, int(eqn.params["k"]), axis)
    dims, _ = output(eqn, 1)
    return [values, graph.node("Cast", places, dims=dims, dtype=np.int32, to=TensorProto.INT32)]


@RULES.of("sort")
def _sort(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    require(len(inputs) == 1, eqn, "sorts several arrays together")
    (x,) = whole(graph, inputs, eqn)
    axis = int(eqn.params["dimension"])
    require(x.dtype == np.float32 and isinstance(x.dims[axis], int), eqn, f"is of {x.dtype}")
    values, _ = _largest(graph, x, x.dims[axis], axis, largest=False)
    return [values]


def _part(graph: Graph, source: Value, place: Value, eqn: Any) -> Value:
    """A part of an array that begins at a known place."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    for axis, start in zip(numbers.start_index_map, np.asarray(place.constant), strict=True):
        size, dim, first = sizes[axis], source.dims[axis], int(start)
        if size == dim and first == 0:
            continue
        known = isinstance(dim, int) and isinstance(size, int)
        require(known and 0 <= first <= dim - size, eqn, "depends on the batch size")
        dims = [size if number == axis else one for number, one in enumerate(source.dims)]
        bounds = (constant(np.array([one], np.int64)) for one in (first, first + size, axis))
        source = graph.node("Slice", source, *bounds, dims=dims, dtype=source.dtype)
    gone = numbers.collapsed_slice_dims
    return graph.reshape(source, [dim for axis, dim in enumerate(source.dims) if axis not in gone])


@RULES.of("gather")
def _gather(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    """Whole rows, columns and so on, at given places of one axis; or one part at a known place."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if inputs[1].constant is not None and inputs[1].constant.ndim == 1:
        source, place = whole(graph, inputs, eqn)
        return [_part(graph, source, place, eqn)]
    require("PROMISE" in str(eqn.params["mode"]), eqn, "may read outside of its array")
    source, places = whole(graph, inputs, eqn)
    require(len(numbers.start_index_map) == 1, eqn, "searches in several axes")
    (axis,) = numbers.start_index_map
    plain = tuple(numbers.collapsed_slice_dims) == (axis,) and not numbers.operand_batching_dims
    is_row = all(
        size == dim for number, (size, dim) in enumerate(zip(sizes, source.dims, strict=True))
        if number != axis
    )  # fmt: skip
    require(plain and is_row and sizes[axis] == 1, eqn, "reads parts of rows")
    dims, dtype = output(eqn)
    places = graph.reshape(places, places.dims[:-1])
    offsets = list(numbers.offset_dims)
    others = [number for number in range(len(dims)) if number not in offsets]
    order = [*offsets[:axis], *others, *offsets[axis:]]  # the output's axes as ONNX gives them
    found = graph.node(
        "Gather", source, places, dims=[dims[one] for one in order], dtype=dtype, axis=int(axis)
    )
    return [graph.transpose(found, np.argsort(order).tolist())]


@RULES.of("scatter")
def _scatter(graph: Graph, inputs: Sequence[Value], eqn: Any) -> list[Value]:
    """New elements at given places of the last axis. Places outside end the run in ONNX."""
    numbers = eqn.params["dimension_numbers"]
    target, places, values = whole(graph, inputs, eqn)
    last = len(target.dims) - 1
    before = tuple(range(last))
    found = (
        tuple(numbers.update_window_dims),
        tuple(numbers.inserted_window_dims),
        tuple(numbers.scatter_dims_to_operand_dims),
        tuple(numbers.operand_batching_dims),
        tuple(numbers.scatter_indices_batching_dims),
    )
    require(found == ((), (last,), (last,), before, before), eqn, "is none along the last axis")
    places = graph.reshape(places, places.dims[:-1])
    dims, dtype = output(eqn)
    return [
        graph.node("ScatterElements", target, places, values, dims=dims, dtype=dtype, axis=last)
    ]
