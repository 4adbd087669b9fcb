"""CPU time to read a training batch of photographs: the decoder alone, squares, and whole pictures.

python -m benchmarks.input --out=runs/input

Writes JPEGs of 500 x 375 pixels, about the size of ImageNet's, and reads each once a round in one
thread, without workers. `square` is the square of 256 pixels that the device crops; `image` cuts two
views of 224 pixels out of the whole picture. With torchvision installed, its own crops take turns too.
"""

import functools
import importlib.util
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL
from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks.measure import environment, interleave, make_parser, write_results
from jevb_jax.images.crop_boxes import HostCrops, key_words
from jevb_jax.images.image_files import FolderSource

WIDTH, HEIGHT = 500, 375
SQUARE, VIEW = 256, 224


def write_pictures(root: Path, count: int, *, quality: int = 90) -> None:
    """Writes different pieces of two real photographs.

    Args:
      root: an existing directory.
      count: number of JPEGs.
      quality: of the JPEGs.
    """
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    places = np.random.default_rng(0).integers(0, (640 - WIDTH, 427 - HEIGHT), (count, 2))
    for number, (left, top) in enumerate(places.tolist()):
        piece = photos[number % 2].crop((left, top, left + WIDTH, top + HEIGHT))
        piece.save(root / f"{number:06d}.jpg", quality=quality)


def readers(root: Path) -> dict[str, Callable[[int], Any]]:
    """What each candidate does with picture `index`, by name."""
    source = FolderSource(root, image_size=SQUARE)
    crops = HostCrops(
        key_words(jax.random.key(0)),
        (VIEW,) * 2,
        ((0.08, 1.0),) * 2,
        (3 / 4, 4 / 3),
        "bilinear",
    )

    @functools.lru_cache(maxsize=1)
    def of_batch(step: int) -> list[Any]:
        return crops.of_examples(step, np.arange(256))

    found: dict[str, Callable[[int], Any]] = {
        "decoder": lambda index: Image.open(source.paths[index]).convert("RGB"),
        "square": source.__getitem__,
        "image": lambda index: source.crops(index, of_batch(index // 256)[index % 256]),
    }
    if importlib.util.find_spec("torchvision"):
        transforms: Any = importlib.import_module("torchvision.transforms")
        crop = transforms.RandomResizedCrop(VIEW, scale=(0.08, 1.0))

        def of_torchvision(index: int) -> Any:
            picture = Image.open(source.paths[index]).convert("RGB")
            return [np.asarray(crop(picture)) for _ in range(2)]

        found["torchvision"] = of_torchvision
    return found


def cpu_seconds(read: Callable[[int], Any], count: int) -> float:
    """CPU seconds of this process to read so many pictures, each once."""
    start = time.process_time()
    for index in range(count):
        read(index)
    return time.process_time() - start


def rows_of(timings: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """A row of the table for each candidate."""
    decoder, square = timings["decoder"], timings["square"]
    return [
        {
            "": name,
            "images / CPU s": count / one.median,
            "CPU time / decoder's": one.ratio_to(decoder),
            "CPU time / square's": one.ratio_to(square),
        }
        for name, one in timings.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and writes the table to `--out`."""
    parser = make_parser(__doc__, num_rounds=5)
    parser.add_argument("--num_images", type=int, default=5000)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="jevb_jax_input_") as folder:
        write_pictures(Path(folder), arguments.num_images)
        timers = {
            name: functools.partial(cpu_seconds, read, arguments.num_images)
            for name, read in readers(Path(folder)).items()
        }
        timings = interleave(timers, num_rounds=arguments.num_rounds)
    command = "python -m benchmarks.input " + shlex.join(sys.argv[1:])
    facts = {**environment(command, vars(arguments)), "pillow": PIL.__version__}
    tables = {"": rows_of(timings, arguments.num_images)}
    print(write_results(arguments.out, "input", facts, tables))


if __name__ == "__main__":
    main()
