"""A trained model in three lines: `model = jevb_jax.load("runs/x")`, then `model.embed(images)`.

Reads a run directory of `train.py` or a directory of `jevb_jax.export`; the second needs none of the
libraries of training. Weights are checked against what was saved, bit by bit; nothing is pickled.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from rich.console import Console
from rich.progress import Progress

from jevb_jax import archive, blueprint, data, data_record, files
from jevb_jax.evaluation import ood, ood_protocol
from jevb_jax.evaluation.features import FeatureExtractor, Features
from jevb_jax.named_arrays import differences, flatten_names, unflatten_names
from jevb_jax.networks import Posterior

_T = TypeVar("_T")
_PROGRESS_AFTER_SECONDS = 3.0


class GaussianPosterior(NamedTuple):
    """q(z given image), a diagonal Gaussian.

    Attributes:
      mean: `[N, D]`, or `[D]` of one image.
      scale: likewise, standard deviations.
    """

    mean: np.ndarray
    scale: np.ndarray


class Model:
    """A trained encoder, asked for images.

    Everywhere, `images` are `[N, h, w, c]`, or one image `[h, w, c]`, whose answer then has no first
    axis; uint8, or floating point in [0, 1]. Any `h` and `w`: an image that is not `image_size`
    pixels a side is resized to it as the evaluation does, whole and antialiased, without a crop and
    without keeping the ratio of its sides. Grey images are repeated to the network's channels.

    Many images go through in padded batches of one size, so that each size and type of image is
    compiled once; fewer than a batch are padded to a power of two. A bar is shown on a terminal once
    it has taken a few seconds. Work is done on the first device of the process.

    Wrong images raise: TypeError for another type than the above; ValueError for a wrong number of
    axes or channels, for none at all, for NaN, and for values out of [0, 1].

    Attributes:
      config: of the run, plain values.
      step: of the checkpoint.
      variables: parameters and running statistics, for use with `network.apply`.
      network: the Flax module.
      image_size: pixels a side that the network sees.
      num_channels: of its images.
      recorded_data: what the run remembers of its data (`data_record.read`), or None.
    """

    def __init__(
        self,
        config: dict[str, Any],
        variables: Any,
        *,
        step: int,
        batch_size: int | None = None,
        recorded_data: Mapping[str, Any] | None = None,
    ):
        """Prepares the forward pass; `load` is the usual way here.

        Args:
          config: of the run, plain values.
          variables: parameters and running statistics.
          step: that they are from.
          batch_size: images at a time; the config's `evaluation.batch_size` by default.
          recorded_data: of `data_record.read`, that the run's own data are held to.

        Raises:
          ValueError: a batch size below one.
        """
        self.config = config
        self.step = step
        self.network = blueprint.make_network(config)
        self._view = blueprint.view_augmentations(config["augmentation"])[0]
        self.image_size = self._view.size
        self.num_channels = len(self._view.mean)
        self._batch_size = config["evaluation"]["batch_size"] if batch_size is None else batch_size
        if self._batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self._batch_size}")
        self.variables = jax.device_put(variables, jax.local_devices()[0])
        self._extractors: dict[tuple[int, bool], FeatureExtractor] = {}
        self._fit_features: dict[bool, Features] = {}
        self._scorers: dict[str, ood_protocol.ScoreFunction] = {}
        self._dataset: data.Dataset | None = None
        self.recorded_data = recorded_data

    def __repr__(self) -> str:
        return (
            f"Model({self.config['method']}, {self.config['model']['backbone']}, step {self.step}, "
            f"images {self.image_size}x{self.image_size}x{self.num_channels})"
        )

    def with_variables(self, variables: Any) -> "Model":
        """The same networks with other weights, compiled already.

        Args:
          variables: parameters and running statistics, of the same shapes.

        Returns:
          A model that shares what was compiled and nothing that was fitted.
        """
        other = Model(
            self.config,
            variables,
            step=self.step,
            batch_size=self._batch_size,
            recorded_data=self.recorded_data,
        )
        other._extractors = self._extractors
        return other

    @property
    def extractor(self) -> FeatureExtractor:
        """All plain features of a source at once, in batches of `batch_size`; see its class."""
        return self._extractor(self._batch_size, False)

    def embed(self, images: ArrayLike) -> np.ndarray:
        """The projector's output, over which JEVB's likelihood is a density.

        Args:
          images: see the class.

        Returns:
          `[N, D]` float32, or `[D]` of one image.
        """
        return self._map(images, lambda features: features.embedding)

    def represent(self, images: ArrayLike) -> np.ndarray:
        """The backbone's pooled output, for k-NN, linear probes and transfer.

        Args:
          images: see the class.

        Returns:
          `[N, F]` float32, or `[F]` of one image.
        """
        return self._map(images, lambda features: features.representation)

    def posterior(self, images: ArrayLike) -> GaussianPosterior:
        """What the model believes of the latent given an image.

        Args:
          images: see the class.

        Returns:
          Mean and standard deviation.

        Raises:
          ValueError: the method has no posterior; and as the class.
        """
        if self.config["method"] != "jevb":
            raise ValueError(
                f"only jevb has a posterior, and this is a {self.config['method']} run"
            )

        def parameters(features: Features) -> GaussianPosterior:
            prediction: Posterior = features.prediction
            return GaussianPosterior(prediction.posterior_mean, prediction.posterior_scale)  # pyright: ignore[reportArgumentType]

        return self._map(images, parameters)

    def ood_score(
        self, images: ArrayLike, score: str | None = None, *, fit_images: ArrayLike | None = None
    ) -> np.ndarray:
        """How strange images are; larger is more out of distribution.

        The scores of docs/ood.md that need no labels, as `evaluate.py` computes them. JEVB's terms
        sample views and latents: the draw depends on an image's place among `images`.

        Args:
          images: see the class.
          score: `family/score`, for instance "jevb/negative_elbo" or "embedding/mahalanobis"; see
            `score_names`. None is the config's or the method's default.
          fit_images: in-distribution images that the score is fitted to; by default, those of the run's
            training split that the evaluation takes, which are loaded and remembered on first use.

        Returns:
          `[N]` float32, or `[]` of one image.

        Raises:
          ValueError: unknown score, one that is not fitted with `fit_images`, a run whose data cannot
            be loaded; and as the class.
        """
        name = self._checked_score(score)
        checked = self._checked_images(images)  # before a fit that may take long
        scorer = self._scorer(name, fit_images)
        return self._map_checked(*checked, lambda features: _apply(scorer, features), of=name)

    def score_names(self) -> list[str]:
        """Names for `ood_score` and `detector`."""
        return sorted(self._fits(self._unfitted()))

    def detector(
        self,
        false_alarm_rate: float = 0.05,
        score: str | None = None,
        *,
        fit_images: ArrayLike | None = None,
        calibration_images: ArrayLike | None = None,
    ) -> "Detector":
        """A detector of strange images, with a threshold by split conformal prediction.

        The score is fitted to training images and its threshold set on validation images, which it
        has not seen, so that of new in-distribution images at most the asked share, in expectation, is
        called strange. That holds for images like the calibration's and for no others.

        Args:
          false_alarm_rate: in (0, 1).
          score: see `ood_score`.
          fit_images: see `ood_score`.
          calibration_images: in-distribution images that are not among those of the fit; by default the
            run's validation split.

        Returns:
          The detector.

        Raises:
          ValueError: fewer than `1 / false_alarm_rate - 1` calibration images; and as `ood_score`.
        """
        name = self._checked_score(score)
        scorer = self._scorer(name, fit_images)

        def score_of(images: ArrayLike) -> np.ndarray:
            return self._map(images, lambda features: _apply(scorer, features), of=name)

        if calibration_images is None:
            source = self._data("calibration_images").validation
            extract = self._extractor(self._batch_size, ood_protocol.needs_terms(name))
            parts = [
                np.asarray(_apply(scorer, features))[mask]
                for features, mask in extract.stream(self.variables, source)
            ]
            calibration = np.concatenate(parts)
        else:
            calibration = np.atleast_1d(score_of(calibration_images))
        threshold = ood.conformal_threshold(calibration, false_alarm_rate)
        return Detector(score_of, name, false_alarm_rate, threshold)

    # --- Scores ---

    def _unfitted(self) -> Features:
        return ood_protocol.unfitted_features(
            self.config["method"], self.config["ood"]["num_views"]
        )

    def _fits(self, features: Features) -> ood_protocol.Fits:
        settings = ood_protocol.score_settings(self.config["ood"])
        return ood_protocol.label_free_fits(features, settings)

    def _checked_score(self, score: str | None) -> str:
        if score is None:
            score = ood_protocol.default_score(self.config["method"], self.config["ood"])
        names = self.score_names()
        if score not in names:
            raise ValueError(
                f"score must be one of {names}, got {score!r}; scores of a linear probe need labels: "
                "evaluate.py computes them"
            )
        return score

    def _scorer(self, name: str, fit_images: ArrayLike | None) -> ood_protocol.ScoreFunction:
        """A score, fitted if it has to be."""
        if not ood_protocol.is_fitted(name):
            if fit_images is not None:
                raise ValueError(f"{name} is not fitted to images: leave out fit_images")
            return self._fits(self._unfitted())[name]()
        has_terms = ood_protocol.needs_terms(name)
        if fit_images is not None:
            images, is_single = self._checked_images(fit_images)
            if is_single:
                raise ValueError("fit_images must be [N, h, w, c], got one image")
            return self._fits(self._run(images, lambda features: features, has_terms))[name]()
        if name not in self._scorers:
            if has_terms not in self._fit_features:
                train = self._data("fit_images").train
                rows = ood_protocol.fit_rows(len(train), self.config["ood"]["max_fit_images"])
                extract = self._extractor(self._batch_size, has_terms)
                self._fit_features[has_terms] = extract(self.variables, data.Subset(train, rows))
            self._scorers[name] = self._fits(self._fit_features[has_terms])[name]()
        return self._scorers[name]

    def _data(self, argument: str) -> data.Dataset:
        """The run's own data; an error names the argument that makes them needless."""
        if self._dataset is None:
            try:
                dataset = data.load_dataset(**self.config["data"])
            except (OSError, ImportError, ValueError, TypeError) as error:
                raise ValueError(
                    f"the run's own images ({self.config['data']['source']}) cannot be loaded here "
                    f"({type(error).__name__}: {error}): pass {argument}= with in-distribution images"
                ) from error
            if self.recorded_data is not None:
                instead = f"{argument}=, images that are like those of its training"
                data_record.check_loaded(self.recorded_data, dataset, instead=instead)
            self._dataset = dataset
        return self._dataset

    # --- Images ---

    def _checked_images(self, images: ArrayLike) -> tuple[np.ndarray, bool]:
        """`[N, h, w, c]` uint8, or floating point in [0, 1], and whether it was one image."""
        try:
            values = np.asarray(images)
        except ValueError as error:
            raise ValueError(f"images must all have one size and type: {error}") from error
        is_float = jnp.issubdtype(values.dtype, jnp.floating)
        if values.dtype != np.uint8 and not is_float:
            raise TypeError(f"images must be uint8, or float in [0, 1], got {values.dtype}")
        if values.ndim not in (3, 4):
            raise ValueError(
                "images must be [N, h, w, c], or one image [h, w, c], got shape "
                f"{values.shape}; grey images need an axis of one channel: images[..., None]"
            )
        if values.size == 0:
            raise ValueError(f"there are no pixels in images of shape {values.shape}")
        if values.shape[-1] not in (1, self.num_channels):
            channels = "1" if self.num_channels == 1 else f"1 or {self.num_channels}"
            raise ValueError(
                f"images must have {channels} channels, the last axis, got shape {values.shape}"
            )
        if is_float:
            low, high = float(values.min()), float(values.max())
            if np.isnan(low):
                count = int(np.sum(np.isnan(values)))
                raise ValueError(f"images hold NaN in {count:,} of {values.size:,} values")
            if low < 0 or high > 1:
                raise ValueError(
                    f"float images must lie in [0, 1], got [{low:.4g}, {high:.4g}]: give pixels of 0 "
                    "to 255 as uint8 or divide them by 255; do not normalise them, the model does"
                )
        is_single = values.ndim == 3
        return (values[None] if is_single else values), is_single

    def _extractor(self, batch_size: int, has_terms: bool) -> FeatureExtractor:
        """The forward pass of a size of batch, compiled on first use."""
        key = batch_size, has_terms
        if key not in self._extractors:
            terms = None
            if has_terms:
                terms = ood_protocol.jevb_terms_settings(
                    self.network,
                    blueprint.jevb_settings(self.config, steps_per_epoch=0),
                    self.config["ood"],
                    augmentation=self._view,
                )
            self._extractors[key] = FeatureExtractor(
                self.network,
                image_size=self.image_size,
                mean=self._view.mean,
                std=self._view.std,
                batch_size=batch_size,
                terms=terms,
            )
        return self._extractors[key]

    def _map(self, images: ArrayLike, output: Callable[[Features], Any], *, of: str = "") -> Any:
        """`output` of the features of every image, on the host; `of` is the name of a score."""
        return self._map_checked(*self._checked_images(images), output, of=of)

    def _map_checked(
        self, images: np.ndarray, is_single: bool, output: Callable[[Features], Any], *, of: str
    ) -> Any:
        whole = self._run(images, output, ood_protocol.needs_terms(of))
        return jax.tree.map(lambda x: x[0], whole) if is_single else whole

    def _run(self, images: np.ndarray, output: Callable[[Features], _T], has_terms: bool) -> _T:
        count = len(images)
        size = min(self._batch_size, 1 << (count - 1).bit_length())
        extract = self._extractor(size, has_terms)

        def outputs() -> Iterator[tuple[_T, int]]:
            for first in range(0, count, size):
                batch = images[first : first + size]
                if batch.dtype != np.uint8:
                    batch = batch.astype(np.float32)
                missing = size - len(batch)
                if missing:
                    batch = np.concatenate(
                        [batch, np.zeros((missing, *batch.shape[1:]), batch.dtype)]
                    )
                yield output(extract.of_batch(self.variables, batch, first)), size - missing

        parts: list[Any] = []
        for part, rows in _with_progress(_one_ahead(outputs()), total=-(-count // size)):
            parts.append(jax.tree.map(lambda x, rows=rows: x[:rows], jax.device_get(part)))
        return jax.tree.map(lambda *values: np.concatenate(values), *parts)


@dataclasses.dataclass(frozen=True)
class Detector:
    """Says which images are out of distribution; of `Model.detector`.

    Attributes:
      score: images, as `Model` takes them, to scores `[N]`; larger is stranger.
      score_name: of it.
      false_alarm_rate: the share of in-distribution images that may be called strange.
      threshold: scores above it are alarms.
    """

    score: Callable[[ArrayLike], np.ndarray]
    score_name: str
    false_alarm_rate: float
    threshold: float

    def is_outside(self, images: ArrayLike) -> np.ndarray:
        """Which images are called out of distribution.

        Args:
          images: see `Model`.

        Returns:
          bool `[N]`, or `[]` of one image; true of a score that is no finite number.
        """
        return ood.exceeds(self.score(images), self.threshold)


@jax.jit
def _apply(score: Callable[[Features], Array], features: Features) -> Array:
    return score(features)


def _one_ahead(items: Iterable[_T]) -> Iterator[_T]:
    """Starts an item before the one before it is fetched, so that device and host work at once."""
    iterator = iter(items)
    waiting = next(iterator)
    for item in iterator:
        yield waiting
        waiting = item
    yield waiting


def _with_progress(
    batches: Iterable[_T], *, total: int, console: Console | None = None
) -> Iterator[_T]:
    """The batches, with a bar on a terminal from the time when they have taken a few seconds."""
    console = console or Console(stderr=True)
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    start = time.monotonic()
    task = None
    try:
        for done, batch in enumerate(batches):
            if task is None and time.monotonic() - start > _PROGRESS_AFTER_SECONDS:
                progress.start()
                task = progress.add_task("images", total=total)
            if task is not None:
                progress.update(task, completed=done)
            yield batch
    finally:
        progress.stop()


# --- Loading --------------------------------------------------------------------------------------


def load(
    path: str | os.PathLike[str],
    step: int | Literal["best"] | None = None,
    *,
    batch_size: int | None = None,
) -> Model:
    """Loads a model from a run directory or from a directory of `jevb_jax.export`.

    Strict: every array must be there, none may be left over, shapes and types must fit the config, and
    the bits must be those that were saved. Of a run with averaged parameters (`train.ema_decay`), the
    average is loaded, as in evaluation. The data of the run are not read.

    Args:
      path: directory, here or in an object store.
      step: of a run: a checkpoint's step, "best" (by validation k-NN, of a run with
        `checkpoint.keep_best`), or None for the latest that is whole.
      batch_size: images at a time; the config's `evaluation.batch_size` by default.

    Returns:
      The model.

    Raises:
      FileNotFoundError: neither a run nor an export.
      CheckpointError: no such checkpoint, or one that does not fit (all arrays are named) or is damaged.
      ArchiveError: an export that is damaged or does not fit.
      ValueError: `step` of an export; a config of another version.
    """
    directory = files.to_path(path)
    if archive.is_archive(directory):
        if step is not None:
            raise ValueError(f"{directory} is an export, which holds one step: leave out step")
        return _load_archive(directory, batch_size)
    if not (directory / "config.json").exists():
        raise FileNotFoundError(
            f"{directory} holds neither config.json (a run of train.py) nor {archive.MANIFEST} (an "
            "export of jevb_jax.export)"
        )
    return _load_run(directory, step, batch_size)


def _checked_config(config: dict[str, Any], where: Path) -> None:
    """Raises if this version cannot build networks and views from a config."""
    try:
        blueprint.make_network(config)
        blueprint.view_augmentations(config["augmentation"])
        blueprint.jevb_settings(config, steps_per_epoch=0)
        for section in ("evaluation", "ood", "data", "train"):
            config[section]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the config of {where} is of another version of jevb_jax: {error!r}"
        ) from error


def variable_shapes(config: Mapping[str, Any]) -> Any:
    """Parameters and running statistics of a config's networks, as shapes and types."""
    network = blueprint.make_network(config)
    view = blueprint.view_augmentations(config["augmentation"])[0]
    image = jax.ShapeDtypeStruct((2, view.size, view.size, len(view.mean)), np.float32)
    return jax.eval_shape(
        lambda key, images: network.init(key, images, train=True), jax.random.key(0), image
    )


def _load_archive(directory: Path, batch_size: int | None) -> Model:
    manifest = archive.read_manifest(directory)
    config = blueprint.completed_config(manifest["config"])
    _checked_config(config, directory)
    wanted = variable_shapes(config)
    arrays = archive.read_arrays(directory, manifest)
    problems = differences(arrays, flatten_names(wanted), where="export")
    if problems:
        raise archive.ArchiveError(f"{directory} does not fit its config:\n" + "\n".join(problems))
    variables = unflatten_names(arrays, wanted)
    return Model(
        config,
        variables,
        step=manifest["step"],
        batch_size=batch_size,
        recorded_data=manifest.get("recorded_data"),  # of exports from before it, there is none
    )


def _load_run(directory: Path, step: int | str | None, batch_size: int | None) -> Model:
    # Orbax and Optax, which an export does without.
    from jevb_jax.checkpoints import Checkpointer, CheckpointError
    from jevb_jax.experiment import state_shapes

    saved = files.read_json(directory / "config.json")
    config = blueprint.completed_config(saved)
    _checked_config(config, directory)
    if not (directory / "checkpoints").exists():
        raise CheckpointError(f"{directory} holds no checkpoint: train first")
    view = blueprint.view_augmentations(config["augmentation"])[0]
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state_shapes(config, (view.size, view.size, len(view.mean))),
    )
    checkpointer = Checkpointer(
        directory / "checkpoints", keep_best=config["checkpoint"]["keep_best"]
    )
    try:
        steps = checkpointer.steps()
        if step == "best":
            best = checkpointer.best_step()
            if best is None:
                raise CheckpointError(
                    f"{directory} kept no best checkpoint: train with checkpoint.keep_best above 0, or "
                    f"give one of the steps {steps}"
                )
            step = best
        if step is None:
            restored = checkpointer.restore_latest(template)
            if restored is None:
                raise CheckpointError(f"{directory} holds no checkpoint: train first")
            found, state = restored
        elif isinstance(step, int) and step in steps:
            found, state = step, checkpointer.restore(step, template)
        else:
            raise CheckpointError(f'{directory} has checkpoints {steps}, not {step!r}; or "best"')
    finally:
        checkpointer.close()
    return Model(
        config,
        state.evaluation_variables,
        step=found,
        batch_size=batch_size,
        recorded_data=data_record.read(directory),
    )
