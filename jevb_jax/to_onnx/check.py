"""Runs an ONNX file beside the function that it was made from."""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jevb_jax import extras
from jevb_jax.to_onnx.graph import ConversionError


def can_run() -> bool:
    """Whether onnxruntime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def run(content: bytes, batch: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs of an ONNX file on a CPU, by name.

    Args:
      content: the bytes of the file; it has one input.
      batch: the input.

    Raises:
      ModuleNotFoundError: onnxruntime is not installed.
    """
    with extras.explained():
        import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    found: Any = session.run(names, {session.get_inputs()[0].name: batch})
    return dict(zip(names, found, strict=True))


def largest_difference(
    content: bytes,
    function: Callable[[Any], Mapping[str, Any]],
    examples: np.ndarray,
    *,
    at_most: float,
) -> float:
    """How far the outputs of an ONNX file are from those of the function, for two sizes of batches.

    The difference of an output is the largest one of its elements, as a share of the largest element
    of JAX's output. Booleans are not compared: rounding may turn one at a threshold.

    Args:
      content: the bytes of the file.
      function: takes a batch, and returns arrays by name.
      examples: a batch. The file runs on all of it, and on the first example alone.
      at_most: a larger difference is an error.

    Returns:
      The largest of all.

    Raises:
      ConversionError: a difference is larger, or an output has another name, shape or type.
      ModuleNotFoundError: onnxruntime is not installed.
    """
    # An accelerator would round products to fewer digits than onnxruntime.
    with jax.default_matmul_precision("highest"):
        wanted = jax.device_get(jax.jit(function)(examples))
    largest = 0.0
    for count in (len(examples), 1):
        found = run(content, examples[:count])
        for name in sorted({*wanted, *found}):
            have, want = found.get(name), wanted.get(name)
            want = None if want is None else want[:count]
            if want is None or have is None or (want.shape, want.dtype) != (have.shape, have.dtype):
                raise ConversionError(
                    f"{name} has another shape or type in onnxruntime than in JAX"
                )
            difference = 0.0 if want.dtype == np.bool_ else _difference(want, have)
            if not difference <= at_most:
                raise ConversionError(
                    f"{name} differs from JAX's by {difference:.1e} of its largest value in "
                    f"onnxruntime, more than {at_most:.0e}"
                )
            largest = max(largest, difference)
    return largest


def _difference(want: np.ndarray, have: np.ndarray) -> float:
    is_equal = (want == have) | (np.isnan(want) & np.isnan(have))
    if is_equal.all():
        return 0.0
    finite = np.isfinite(want)
    with np.errstate(invalid="ignore"):
        apart = np.where(is_equal, 0.0, np.abs(want.astype(np.float64) - have))
    unit = float(np.max(np.abs(want[finite]), initial=0.0)) or 1.0
    largest = float(np.max(apart))
    return largest / unit if np.isfinite(largest) else float("inf")
