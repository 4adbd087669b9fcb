"""Which extra of the package brings what: the core needs JAX, NumPy and jaxtyping alone.

Nothing here needs an extra, so that the message about a missing one can always be given.
"""

import contextlib
from collections.abc import Iterator

# By the name that is imported, the extra of pyproject.toml that brings it.
EXTRAS = {
    "PIL": "train",
    "absl": "train",
    "cloudpickle": "train",
    "cykooz_resizer": "photos",
    "distrax": "distrax",
    "etils": "train",
    "filelock": "train",
    "flatbuffers": "train",
    "flax": "train",
    "grain": "train",
    "huggingface_hub": "hub",
    "jinja2": "report",
    "markupsafe": "report",
    "matplotlib": "report",
    "ml_collections": "train",
    "mlflow": "mlflow",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "optax": "train",
    "orbax": "train",
    "pyarrow": "hf",
    "rich": "train",
    "safetensors": "train",
    "simplejpeg": "photos",
    "sklearn": "train",
    "tensorboardX": "tensorboard",
    "tensorflow_datasets": "tfds",
    "tensorflow_probability": "distrax",
    "threadpoolctl": "train",
    "trackio": "trackio",
    "wandb": "wandb",
}


def advice(error: ModuleNotFoundError) -> str | None:
    """What to install so that an import succeeds; None if no extra brings what is missing."""
    missing = str(error.name or "").partition(".")[0]
    if missing not in EXTRAS:
        return None
    extra = EXTRAS[missing]
    return (
        f"{missing} is not installed: pip install 'jevb-jax[{extra}]' (in a checkout: '.[{extra}]')"
    )


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Around imports: a missing package is an error that says which extra brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        message = advice(error)
        if message is None:
            raise
        raise ModuleNotFoundError(message, name=error.name) from error
