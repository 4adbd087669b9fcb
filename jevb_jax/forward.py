"""The forward pass for users' images or features: makes batches, compiles once for each size."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from jevb_jax.evaluation import csi, detection
from jevb_jax.evaluation.features import FeatureExtractor, Features
from jevb_jax.evaluation.score_table import AugmentedViews
from jevb_jax.images.augmentations import ViewAugmentation
from jevb_jax.images.feature_views import ColumnStatistics
from jevb_jax.images.given import (
    GivenImages,
    check_features,
    check_images,
    in_order,
    prepared,
)
from jevb_jax.images.preparation import cut_square
from jevb_jax.networks.joint import JointEmbeddingModel
from jevb_jax.runs.waiting import Waiting
from jevb_jax.settings.sections import RunSettings
from jevb_jax.training import from_settings

_T = TypeVar("_T")
_PROGRESS_AFTER_SECONDS = 3.0


class ForwardPass:
    """The compiled networks, without weights, for images of any size and number, or for features.

    Attributes:
      network: the Flax module.
      view: the view of evaluation.
      square_size: height and width of the square that is cut out first, in pixels; 0 for none.
      batch_size: largest number of images at once.
    """

    def __init__(
        self,
        network: JointEmbeddingModel,
        settings: RunSettings,
        *,
        square_size: int,
        batch_size: int,
        statistics: ColumnStatistics | None = None,
    ):
        """Stores the arguments. Programs are compiled on first use.

        Args:
          network: the Flax module.
          settings: settings of the run.
          statistics: of the columns, for features; from `from_settings.saved_statistics`.
        """
        self.network = network
        self.view = from_settings.views(settings, statistics)[0]
        self.square_size = square_size
        self.batch_size = batch_size
        self._settings = settings
        self._extractors: dict[tuple[int, AugmentedViews], FeatureExtractor] = {}

    def share_programs_of(self, other: "ForwardPass") -> None:
        """Uses, and adds to, the compiled programs of another `ForwardPass` of the same networks."""
        self._extractors = other._extractors

    def checked(self, images: Any) -> GivenImages:
        """Checks images, or features, and groups them by size and type."""
        if isinstance(self.view, ViewAugmentation):
            return check_images(
                images,
                num_channels=len(self.view.mean),
                square_size=self.square_size,
                exif=self._settings.data.exif,
                levels=self._settings.data.levels,
            )
        return check_features(
            images,
            num_features=self.view.num_features,
            num_stored_views=self._settings.feature_views.num_stored_views,
        )

    def extractor(self, batch_size: int, *, views: AugmentedViews) -> FeatureExtractor:
        """The forward pass for a batch size and the views of a score, compiled on first use."""
        key = batch_size, views
        if key not in self._extractors:
            reads: dict[str, Any] = {}
            if views == "rotations":
                reads["rotated"] = csi.rotated_views(self._settings.ood, self.view)
            elif views == "terms":
                reads["terms"] = detection.jevb_terms_settings(
                    self.network,
                    from_settings.jevb_settings(self._settings, steps_per_epoch=0),
                    self._settings.ood,
                    augmentation=self.view,
                )
            self._extractors[key] = FeatureExtractor(
                self.network,
                view=self.view,
                batch_size=batch_size,
                **reads,
            )
        return self._extractors[key]

    def of(
        self,
        variables: Any,
        images: GivenImages,
        output: Callable[[Features], _T],
        *,
        views: AugmentedViews = "",
    ) -> _T:
        """`output` of the features of every image, a tree of `[N, ...]` on the host.

        Args:
          variables: parameters and running statistics.
          images: from `checked`.
          output: maps the features of a batch to a tree of arrays `[n, ...]`.
          views: `ScoreEntry.views` of the score; by default only the un-augmented view is read.

        Raises:
          ValueError: augmented views are read, and stored views are missing.
        """
        if not isinstance(self.view, ViewAugmentation):
            return self._of_features(variables, images.stacks[0], output, views)
        if len(images.stacks) > 1 and not views:
            return self._of_views(variables, images, self.view, output)
        # Augmented views are cut out of the whole image, so each image size needs its own program.
        parts = [
            self._of_batches(
                variables,
                lambda start, stop, stack=stack: prepared(stack[start:stop], self.square_size),
                len(stack),
                output,
                views,
            )
            for stack in images.stacks
        ]
        return in_order(parts, images.rows, jax.tree.map)

    def _of_features(
        self,
        variables: Any,
        features: np.ndarray,
        output: Callable[[Features], _T],
        views: AugmentedViews,
    ) -> _T:
        stored = self._settings.feature_views.num_stored_views
        if views and stored > 1 and features.ndim == 2:
            raise ValueError(
                f"this score reads several views of an example, and the run has {stored} stored ones: "
                f"give features [N, {stored}, {features.shape[-1]}], or choose a score of one view"
            )
        return self._of_batches(
            variables, lambda start, stop: features[start:stop], len(features), output, views
        )

    def _of_views(
        self,
        variables: Any,
        images: GivenImages,
        view: ViewAugmentation,
        output: Callable[[Features], _T],
    ) -> _T:
        """Resizes images of many sizes to the view on the host, so that one program serves all."""
        places = np.argsort(np.concatenate(images.rows))
        flat = [image for stack in images.stacks for image in stack]
        num_channels = len(view.mean)

        def batch(start: int, stop: int) -> np.ndarray:
            views = []
            for place in places[start:stop]:
                image = prepared(flat[place][None], self.square_size)[0]
                if image.dtype == np.uint8:
                    image = image.astype(np.float32) / 255
                image = np.broadcast_to(image, (*image.shape[:2], num_channels))
                views.append(cut_square(image, view.size))
            return np.stack(views)

        return self._of_batches(variables, batch, len(flat), output, "")

    def _of_batches(
        self,
        variables: Any,
        batch_of: Callable[[int, int], np.ndarray],
        count: int,
        output: Callable[[Features], _T],
        views: AugmentedViews,
    ) -> _T:
        size = min(self.batch_size, 1 << (count - 1).bit_length())
        extract = self.extractor(size, views=views)

        def outputs() -> Iterator[tuple[_T, int]]:
            for first in range(0, count, size):
                batch = batch_of(first, min(first + size, count))
                missing = size - len(batch)
                if missing:
                    batch = np.concatenate(
                        [batch, np.zeros((missing, *batch.shape[1:]), batch.dtype)]
                    )
                yield output(extract.of_batch(variables, batch)), size - missing

        parts: list[Any] = []
        for part, rows in _with_progress(_one_ahead(outputs()), total=-(-count // size)):
            parts.append(jax.tree.map(lambda x, rows=rows: x[:rows], jax.device_get(part)))
        return jax.tree.map(lambda *values: np.concatenate(values), *parts)


def _one_ahead(items: Iterable[_T]) -> Iterator[_T]:
    """Computes an item before the previous one is fetched, so that device and host work at once."""
    iterator = iter(items)
    waiting = next(iterator)
    for item in iterator:
        yield waiting
        waiting = item
    yield waiting


def _with_progress(
    batches: Iterable[_T], *, total: int, console: Console | None = None
) -> Iterator[_T]:
    """The batches. On a terminal: what is compiled for the first; a bar after a few seconds."""
    console = console or Console(stderr=True)
    batches = iter(batches)
    with Waiting(console, "The first images", in_logs=False):
        first = [*itertools.islice(batches, 1)]
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    start = time.monotonic()
    task = None
    try:
        for done, batch in enumerate(itertools.chain(first, batches)):
            if task is None and time.monotonic() - start > _PROGRESS_AFTER_SECONDS:
                progress.start()
                task = progress.add_task("images", total=total)
            if task is not None:
                progress.update(task, completed=done)
            yield batch
    finally:
        progress.stop()
