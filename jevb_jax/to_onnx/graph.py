"""An ONNX graph that is being built: its values, nodes and constants."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jevb_jax import extras

with extras.explained():
    import onnx
    from onnx import numpy_helper

# Both are old enough for every runtime of the last years (onnxruntime 1.14, of 2023).
OPSET = 18
IR_VERSION = 8

_TYPES: dict[str, int] = {
    "float32": onnx.TensorProto.FLOAT,
    "int32": onnx.TensorProto.INT32,
    "int64": onnx.TensorProto.INT64,
    "uint8": onnx.TensorProto.UINT8,
    "bool": onnx.TensorProto.BOOL,
}


class ConversionError(ValueError):
    """A function has a part that we cannot write as ONNX."""


def onnx_type(dtype: Any) -> int:
    """ONNX's number of a type.

    Raises:
      ConversionError: it is a type that runtimes do not compute with everywhere.
    """
    name = np.dtype(dtype).name
    if name not in _TYPES:
        raise ConversionError(f"it computes with {name}; ONNX is written for {', '.join(_TYPES)}")
    return _TYPES[name]


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor of the graph.

    Attributes:
      dims: its dimensions. Where JAX's array has more, this one has 1: it is broadcast when it must
        be. A dimension that depends on the batch size is not an int.
      dtype: type of its elements.
      name: of the tensor in the graph; "" for a constant.
      constant: the array of a constant; None for the others.
    """

    dims: tuple[Any, ...]
    dtype: np.dtype[Any]
    name: str = ""
    constant: np.ndarray | None = None


def constant(array: Any) -> Value:
    """A constant. It enters the graph when a node reads it."""
    values = np.asarray(array)
    return Value(values.shape, values.dtype, constant=values)


def is_static(dims: Sequence[Any]) -> bool:
    """Whether no dimension depends on the batch size."""
    return all(isinstance(dim, int) for dim in dims)


def broadcast_dims(*shapes: Sequence[Any]) -> tuple[Any, ...]:
    """Dimensions of tensors of one rank, or single numbers, that are broadcast with each other."""
    ranked = [dims for dims in shapes if dims]
    return tuple(
        next((dim for dim in dims if not (isinstance(dim, int) and dim == 1)), 1)
        for dims in zip(*ranked, strict=True)
    )


class Graph:
    """Nodes and constants in the order in which they are added.

    Args:
      batch: the dimension that the caller chooses.
      batch_of: name of an input whose first dimension it is.
    """

    def __init__(self, batch: Any, batch_of: str):
        self._batch = batch
        self._batch_of = batch_of
        self._count = 0
        self._written: dict[Any, str] = {}
        self._batch_size: Value | None = None
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def node(
        self,
        operator: str,
        *inputs: Value,
        dims: Sequence[Any],
        dtype: Any = np.float32,
        **attributes: Any,
    ) -> Value:
        """Adds a node with one output.

        Args:
          operator: name of the ONNX operator.
          inputs: tensors that it reads.
          dims: dimensions of the output.
          dtype: type of the output.
          attributes: of the operator.
        """
        (value,) = self.nodes_of(operator, *inputs, outputs=[(dims, dtype)], **attributes)
        return value

    def nodes_of(
        self,
        operator: str,
        *inputs: Value,
        outputs: Sequence[tuple[Sequence[Any], Any]],
        **attributes: Any,
    ) -> list[Value]:
        """Adds a node with several outputs, given by their dimensions and types; see `node`."""
        values = []
        for dims, dtype in outputs:
            onnx_type(dtype)
            self._count += 1
            values.append(Value(tuple(dims), np.dtype(dtype), name=f"v{self._count}"))
        names = [self.name(one) for one in inputs]
        made = onnx.helper.make_node(operator, names, [one.name for one in values], **attributes)
        self.nodes.append(made)
        return values

    def elementwise(self, operator: str, *inputs: Value, dtype: Any = None) -> Value:
        """Adds a node whose inputs, all of one rank or single numbers, are broadcast.

        Args:
          operator: name of the ONNX operator.
          inputs: tensors that it reads.
          dtype: type of the output; by default that of the last input.
        """
        dims = broadcast_dims(*(one.dims for one in inputs))
        return self.node(
            operator, *inputs, dims=dims, dtype=inputs[-1].dtype if dtype is None else dtype
        )

    def like(self, value: Value, number: float) -> Value:
        """A constant number that is broadcast with a value, with its rank and type."""
        return constant(np.full((1,) * len(value.dims), number, value.dtype))

    def name(self, value: Value) -> str:
        """Name of a value in the graph. A constant is written when it is first asked for."""
        if value.constant is None:
            return value.name
        array = np.ascontiguousarray(value.constant).reshape(value.constant.shape)
        key = (array.dtype.name, array.shape, hashlib.sha256(array.data).digest())
        if key not in self._written:
            onnx_type(array.dtype)
            self._count += 1
            self._written[key] = f"c{self._count}"
            self.initializers.append(numpy_helper.from_array(array, self._written[key]))
        return self._written[key]

    def reshape(self, value: Value, dims: Sequence[Any]) -> Value:
        """A value with other dimensions and the same elements."""
        dims = tuple(dims)
        if value.dims == dims:
            return value
        if value.constant is not None:
            return constant(value.constant.reshape(dims))
        unknown = [dim for dim in dims if not isinstance(dim, int)]
        if len(unknown) > 1 or (unknown and 0 in dims):
            raise ConversionError(f"it reshapes {value.dims} to {dims}, which is not known before")
        shape = np.array([dim if isinstance(dim, int) else -1 for dim in dims], np.int64)
        return self.node("Reshape", value, constant(shape), dims=dims, dtype=value.dtype)

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """A value with its axes in another order."""
        order = [int(axis) for axis in order]
        if order == list(range(len(order))):
            return value
        if value.constant is not None:
            return constant(value.constant.transpose(order))
        dims = [value.dims[axis] for axis in order]
        return self.node("Transpose", value, dims=dims, dtype=value.dtype, perm=order)

    def full(self, value: Value, dims: Sequence[Any]) -> Value:
        """A value broadcast to the dimensions that JAX's array has."""
        dims = tuple(dims)
        if value.dims == dims:
            return value
        if value.constant is not None and is_static(dims):
            return constant(np.broadcast_to(value.constant, dims))
        # ONNX broadcasts both ways, so 1 keeps what the value has.
        parts = [
            self._dimension(dim if have == 1 else 1)
            for have, dim in zip(value.dims, dims, strict=True)
        ]
        known = [part.constant for part in parts if part.constant is not None]
        if len(known) == len(parts):
            shape = constant(np.concatenate(known))
        else:
            shape = self.node("Concat", *parts, dims=[len(parts)], dtype=np.int64, axis=0)
        return self.node("Expand", value, shape, dims=dims, dtype=value.dtype)

    def _dimension(self, dim: Any) -> Value:
        """One dimension as a tensor `[1]`."""
        if isinstance(dim, int):
            return constant(np.array([dim], np.int64))
        if dim != self._batch:
            raise ConversionError(f"it makes an array of {dim} rows")
        if self._batch_size is None:
            source = Value((), np.dtype(np.float32), name=self._batch_of)
            self._batch_size = self.node("Shape", source, dims=[1], dtype=np.int64, start=0, end=1)
        return self._batch_size

    def model(
        self,
        inputs: Sequence[tuple[str, Sequence[Any], Any]],
        outputs: Sequence[tuple[str, Value]],
        *,
        metadata: dict[str, str],
        producer: tuple[str, str],
    ) -> bytes:
        """The whole graph as the bytes of a checked file.

        Args:
          inputs: names, dimensions and types.
          outputs: names and values.
          metadata: texts by name, stored in the file.
          producer: name and version of the program that writes it.

        Raises:
          ConversionError: the file would be larger than ONNX's limit of 2 GB.
        """

        def described(name: str, dims: Sequence[Any], dtype: Any) -> Any:
            shape = [dim if isinstance(dim, int) else str(dim) for dim in dims]
            return onnx.helper.make_tensor_value_info(name, onnx_type(dtype), shape)

        for name, value in outputs:
            self.nodes.append(onnx.helper.make_node("Identity", [self.name(value)], [name]))
        num_bytes = sum(len(one.raw_data) for one in self.initializers)
        if num_bytes > 2_000_000_000:
            raise ConversionError(f"it holds {num_bytes:,} bytes, and a file of ONNX at most 2 GB")
        graph = onnx.helper.make_graph(
            self.nodes,
            "jevb_jax",
            [described(*one) for one in inputs],
            [described(name, value.dims, value.dtype) for name, value in outputs],
            initializer=self.initializers,
        )
        model = onnx.helper.make_model(
            graph,
            opset_imports=[onnx.helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name=producer[0],
            producer_version=producer[1],
        )
        onnx.helper.set_model_props(model, metadata)
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()
