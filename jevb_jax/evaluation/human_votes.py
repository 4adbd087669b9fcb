"""Votes of people for the classes of images, as CIFAR-10H has them, from a file."""

import numpy as np

from jevb_jax.evaluation import reliability
from jevb_jax.images import array_files
from jevb_jax.runs import files

_ENTRY = "cifar10h_counts"


def read_votes(path: str, *, num_images: int) -> np.ndarray:
    """The file `ood.human_counts_path`, checked: before training, and again when it is used.

    Args:
      path: `.npz` file with an entry `cifar10h_counts`.
      num_images: number of evaluated images.

    Returns:
      `[N, C]`, as for `reliability.label_entropy`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is another file or a damaged one, or it holds votes for other images.
    """
    where = f"ood.human_counts_path = {path!r}"
    file = files.to_path(path)
    if not file.exists():
        raise FileNotFoundError(f"{where}: no file at {path}")

    def check(shape: tuple[int, ...], _: np.dtype) -> None:
        if len(shape) != 2 or shape[0] != num_images:
            raise ValueError(
                f"{where} holds votes of shape {shape}, but {num_images:,} images are evaluated. "
                "Give votes for the whole test set, in its order"
            )

    entries = array_files.read_npz(file, [_ENTRY], says="people's votes", check=check)
    try:
        reliability.label_entropy(entries[_ENTRY])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}, `{_ENTRY}`: {error}") from error
    return entries[_ENTRY]
