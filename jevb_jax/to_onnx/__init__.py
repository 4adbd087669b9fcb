"""Functions of JAX as ONNX graphs: `convert.to_onnx` writes one, `check.largest_difference` runs it."""
