"""A trained model: `model = jevb_jax.load("runs/x")`, then `model.embed(images)`.

Our files contain no pickles. You can still pickle a model or a detector yourself, for example to
send it to another process.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from rich.console import Console

from jevb_jax import arguments, methods
from jevb_jax.detector import Detector
from jevb_jax.evaluation import conformal, detection, detector_input, score_table
from jevb_jax.evaluation.features import FeatureExtractor, Features
from jevb_jax.evaluation.fitted_scores import FittedScores
from jevb_jax.evaluation.score_table import (
    AugmentedViews,
    ScoreEntry,
    ScoreFunction,
    TrainingData,
)
from jevb_jax.forward import ForwardPass
from jevb_jax.images import data_record
from jevb_jax.images.dataset import Dataset, load_dataset
from jevb_jax.images.given import GivenImages, refuse_shared
from jevb_jax.images.source import Subset
from jevb_jax.images.views import describe
from jevb_jax.networks.heads import Posterior
from jevb_jax.runs.waiting import Waiting
from jevb_jax.settings import read
from jevb_jax.training import from_settings
from jevb_jax.xla_options import in_single_precision

_logger = logging.getLogger(__name__)

# Images that `Model` accepts: arrays, Pillow pictures, and lists or iterators of them.
if TYPE_CHECKING:
    from PIL.Image import Image

    Images = ArrayLike | Iterable[Any] | Image
else:  # Pillow is needed only by those who give pictures
    Images = ArrayLike | Iterable[Any]


class GaussianPosterior(NamedTuple):
    """The diagonal Gaussian q(z given image).

    Attributes:
      mean: `[N, D]`; `[D]` for one image.
      scale: standard deviations, of the shape of `mean`.
    """

    mean: np.ndarray
    scale: np.ndarray


class Model:
    """A trained encoder that can be applied to images.

    `images` are always one of these: an array `[N, h, w, c]`; one image `[h, w, c]` or one Pillow
    picture, whose result then has no first axis; or a list, tuple or iterator of such images and
    pictures, which may differ in size. Arrays may come from NumPy, JAX, or anything that NumPy can
    read. They are uint8, or floating point in [0, 1]; values outside by at most 0.001, or one step
    of a coarser type, are clipped. Other integers are levels of 0 to 255, and booleans are black
    and white. Gray images are repeated to the channels of the network. Pictures of every mode with
    8 bits for each channel are decoded as the files of the run were.

    Images may have any height and width. They are prepared as the images of training and evaluation
    were, without a change of the aspect ratio. If the images of the run were resized when they were
    read (`data.image_size`), the shorter side is first resized to that size and the center square
    is cut out (`images.preparation`), with the same pixels as from a file. Then every image is
    resized until its shorter side is `image_size`, and the center is cut out, as in evaluation.

    Many images are processed in padded batches of one size, so that each size and type of image is
    compiled once. Fewer images than a batch are padded to a power of two. Except for rounding, the
    result for an image depends neither on its place nor on the other images. On a terminal, a bar
    appears after a few seconds. Work is done on the first device of the process, in float32 even if
    the process has enabled 64 bits. A pickled or copied model keeps weights, settings, and the place
    where its fitted scores are saved, but not compiled programs and the scores themselves.

    Wrong images raise TypeError if they are neither numbers nor pictures, or if their range of
    levels is unclear (16 bits, unless the run is of such images; integers that are all 0 or 1).
    They raise ValueError for a wrong number of axes or channels, no images, NaN, or values out of
    range.

    A model of features (`data.source = "features"`) takes features in the place of images: `[N, F]`,
    `[F]` of one example, or `[N, V, F]` with stored views as in training (docs/any_encoder.md).

    Attributes:
      config: config of the run, plain values.
      settings: the typed settings of the config.
      step: training step of the checkpoint, from 0.
      variables: parameters and running statistics, for `network.apply`.
      network: the Flax module.
      image_size: height and width that the network reads, in pixels; 0 for features.
      square_size: height and width of the square that is cut out first, in pixels; 0 for none.
      num_channels: of images, 1 for gray and 3 for color; 0 for features.
      num_features: width of features; 0 for images.
      recorded_data: the record of the run's data, from `data_record.read`, or None.
    """

    @in_single_precision
    def __init__(
        self,
        config: dict[str, Any],
        variables: Any,
        *,
        step: SupportsIndex,
        batch_size: SupportsIndex | None = None,
        square_size: SupportsIndex | None = None,
        recorded_data: Mapping[str, Any] | None = None,
        read_fitted: Callable[[], FittedScores | None] | None = None,
    ):
        """Prepares the forward pass. Usually you call `load`.

        Args:
          config: config of the run, plain values.
          variables: parameters and running statistics.
          step: training step of the variables.
          batch_size: number of images at once, by default `evaluation.batch_size` of the config.
          square_size: see the class; by default `data.image_size` of the config.
          recorded_data: from `data_record.read`. If given, the run's data must agree with it.
          read_fitted: reads the scores that were fitted to features of these weights. It is called
            when the first of them is needed; None if there are none.

        Raises:
          ValueError: the batch size is below one, or `square_size` below zero.
          TypeError: a number is not whole, or is a float.
        """
        self.config = config
        self.settings = read.saved_settings(config)
        self.step = arguments.whole_number("step", step)
        self.network = from_settings.make_network(self.settings)
        self.square_size = arguments.whole_number(
            "square_size",
            self.settings.data.image_size if square_size is None else square_size,
            at_least=0,
        )
        size = arguments.whole_number(
            "batch_size",
            self.settings.evaluation.batch_size if batch_size is None else batch_size,
            at_least=1,
        )
        self._forward = ForwardPass(
            self.network,
            self.settings,
            square_size=self.square_size,
            batch_size=size,
            statistics=from_settings.saved_statistics(self.settings, variables),
        )
        shape = from_settings.shape_of_view(self.settings)
        self.image_size, self.num_channels = (0, 0) if len(shape) == 1 else shape[1:]
        self.num_features = shape[0] if len(shape) == 1 else 0
        self.variables = jax.device_put(variables, jax.local_devices()[0])
        self._training_data: dict[AugmentedViews, TrainingData] = {}
        self._scorers: dict[str, ScoreFunction] = {}
        self._dataset: Dataset | None = None
        self.recorded_data = recorded_data
        self._read_fitted = read_fitted

    def __reduce__(self) -> tuple[Any, ...]:
        # Devices and compiled programs cannot be pickled.
        state = self.config, jax.device_get(self.variables), self.step, self._forward.batch_size
        return _model_again, (*state, self.square_size, self.recorded_data, self._read_fitted)

    def __repr__(self) -> str:
        return (
            f"Model({self.settings.method}, {self.settings.model.backbone}, step {self.step}, "
            f"{describe(self._forward.view)})"
        )

    def with_variables(self, variables: Any) -> "Model":
        """A model with the same networks and other weights.

        It shares the compiled programs, but no fitted scores.

        Args:
          variables: parameters and running statistics, of the same shapes.
        """
        return self._like(variables, self.square_size)

    def with_square_size(self, square_size: int) -> "Model":
        """The same model for images that were resized to another size than the run's.

        It shares the compiled programs, but no fitted scores.

        Args:
          square_size: height and width of the square that is cut out of every image, in pixels; 0
            for none.
        """
        return self._like(self.variables, square_size)

    def _like(self, variables: Any, square_size: int) -> "Model":
        other = Model(
            self.config,
            variables,
            step=self.step,
            batch_size=self._forward.batch_size,
            square_size=square_size,
            recorded_data=self.recorded_data,
        )
        other._forward.share_programs_of(self._forward)
        return other

    @in_single_precision
    def extractor(self, views: AugmentedViews = "") -> FeatureExtractor:
        """Computes the features of a whole source in batches; for `views` see `ScoreEntry`."""
        return self._forward.extractor(self._forward.batch_size, views=views)

    @in_single_precision
    def embed(self, images: Images) -> np.ndarray:
        """The projector's output. JEVB's likelihood is a density of it.

        Returns:
          `[N, D]` float32; `[D]` for one image.
        """
        return self._map(images, lambda features: features.embedding)

    @in_single_precision
    def represent(self, images: Images) -> np.ndarray:
        """The backbone's pooled output, for k-NN, linear probes and transfer; or the features.

        Returns:
          `[N, F]` float32; `[F]` for one image.
        """
        return self._map(images, lambda features: features.representation)

    @in_single_precision
    def posterior(self, images: Images) -> GaussianPosterior:
        """Mean and standard deviation of the latent given each image.

        Raises:
          ValueError: the method has no posterior, or the images are wrong (see the class).
        """
        if methods.METHODS[self.settings.method].head != "posterior":
            raise ValueError(f"only jevb has a posterior, but this is a {self.settings.method} run")

        def parameters(features: Features) -> GaussianPosterior:
            prediction: Posterior = features.prediction
            return GaussianPosterior(prediction.posterior_mean, prediction.posterior_scale)  # pyright: ignore[reportArgumentType]

        return self._map(images, parameters)

    @in_single_precision
    def ood_score(
        self, images: Images, score: str | None = None, *, fit_images: Images | None = None
    ) -> np.ndarray:
        """How strange images are; larger is more out of distribution.

        These are the scores of docs/ood.md that need no labels, computed as `evaluate.py` does.
        JEVB's terms need random views and latents. All images share the same draws, so the score of
        an image depends on that image only.

        Args:
          score: `family/score`, for example "jevb/negative_elbo" or "embedding/mahalanobis", one of
            `score_names()`. None takes the default of the config or the method.
          fit_images: in-distribution images to fit the score to. By default the score is that which
            the evaluation of the run saved. If there is none, it is fitted on first use to the
            images of the run's training split that the evaluation uses.

        Returns:
          `[N]` float32; `[]` for one image.

        Raises:
          ValueError: the score is unknown, or needs no `fit_images`; the data of the run cannot be
            loaded; or the images are wrong (see the class).
          ArchiveError: the saved score is damaged, or was fitted to another encoder.
        """
        name = self._checked_score(score)
        checked = self._forward.checked(images)  # check before a fit that may take long
        scorer = self.scorer(name, fit_images)
        return self._score_checked(checked, name, scorer)

    @in_single_precision
    def score_names(self) -> list[str]:
        """Names of the scores for `ood_score` and `detector`."""
        return sorted(self._score_entries)

    @in_single_precision
    def detector(
        self,
        false_alarm_rate: float = 0.05,
        score: str | None = None,
        *,
        fit_images: Images | None = None,
        calibration_images: Images | None = None,
    ) -> Detector:
        """A detector of strange images, with a threshold by split conformal prediction.

        The score is fitted to training images, and its threshold is set by validation images, which
        it has not seen. The expected share of new in-distribution images that are called strange is
        then at most `false_alarm_rate`. This holds only for images like the calibration images.

        Args:
          false_alarm_rate: in (0, 1).
          score: as for `ood_score`.
          fit_images: as for `ood_score`.
          calibration_images: in-distribution images that the score is not fitted to; by default the
            validation split of the run, whose values are saved with the fitted scores.

        Raises:
          ValueError: there are fewer than `1 / false_alarm_rate - 1` calibration images, one of them
            is also in `fit_images`, or for the reasons of `ood_score`.
          ArchiveError: as for `ood_score`.
        """
        name = self._checked_score(score)
        rate = detector_input.checked_share("false_alarm_rate", false_alarm_rate)
        if fit_images is None and calibration_images is None:
            saved = self.fitted_scores
            if saved is not None and name in saved.calibration:
                threshold = conformal.conformal_threshold(saved.calibration[name], rate)
                return Detector(self, self.scorer(name, None), name, rate, threshold)
        checked: GivenImages | None = None
        source: Any = None
        if calibration_images is None:
            also_fitted = fit_images is None and self._score_entries[name].is_fitted
            needed = "fit_images= and calibration_images" if also_fitted else "calibration_images"
            source = self._data(needed).validation
        else:
            checked = self._forward.checked(calibration_images)
        # Check before the fit whether the threshold can exist.
        count = len(source) if checked is None else checked.num_images
        conformal.checked_rate(rate, count)
        if fit_images is not None and checked is not None:
            fit_images = list(fit_images) if isinstance(fit_images, Iterator) else fit_images
            refuse_shared(self._forward.checked(fit_images), checked)
        scorer = self.scorer(name, fit_images)
        if checked is None:
            extract = self.extractor(self._score_entries[name].views)
            with Waiting(Console(stderr=True), "Scoring validation images", in_logs=False):
                parts = [
                    np.asarray(_apply(scorer, features))[mask]
                    for features, mask in extract.stream(self.variables, source)
                ]
            calibration = np.concatenate(parts)
        else:
            calibration = np.atleast_1d(self._score_checked(checked, name, scorer))
        return Detector(self, scorer, name, rate, conformal.conformal_threshold(calibration, rate))

    def as_nnx(self) -> Any:
        """The network with its weights as a `flax.nnx.Module`, through Flax's bridge.

        `model.as_nnx()(views, train=False)` maps normalized images of the trained size, `[N, h, w, c]`
        float32, to `networks.joint.ViewOutputs`. Unlike the model, it prepares no images.
        """
        from flax import nnx  # only this needs it, and it takes a second to import
        from flax.nnx.bridge.variables import linen_vars_to_nnx_attrs

        module = nnx.bridge.ToNNX(self.network)
        for name, value in linen_vars_to_nnx_attrs(self.variables).items():
            setattr(module, name, value)
        return module

    # --- Scores ---

    @functools.cached_property
    def fitted_scores(self) -> FittedScores | None:
        """The scores that the evaluation of the run saved; None if there are none.

        Raises:
          ArchiveError: they are damaged, or were fitted to another encoder.
        """
        saved = None if self._read_fitted is None else self._read_fitted()
        if saved is not None:
            saved.check_belongs(self.variables, self.settings.ood)
        return saved

    @functools.cached_property
    def _score_entries(self) -> dict[str, ScoreEntry]:
        return score_table.scores_of_run(self.settings, has_labels=False)

    def _checked_score(self, score: str | None) -> str:
        if score is None:
            score = score_table.default_score(self.settings)
        names = self.score_names()
        if score not in names:
            raise ValueError(
                f"score must be one of {names}, got {score!r}. Scores of a linear probe need labels; "
                "evaluate.py computes them"
            )
        return score

    @in_single_precision
    def scorer(self, name: str, fit_images: Images | None) -> ScoreFunction:
        """A fitted score, for `scores_of`; arguments and errors are those of `ood_score`."""
        entry = self._score_entries[name]
        if not entry.is_fitted:
            if fit_images is not None:
                raise ValueError(f"{name} is not fitted to images: leave out fit_images")
            return entry.make(None)
        views = entry.views
        if fit_images is not None:
            images = self._forward.checked(fit_images)
            if images.is_single:
                raise ValueError("fit_images must have several examples, got one")
            features = self._forward.of(
                self.variables, images, lambda features: features, views=views
            )
            return entry.make(TrainingData(features))
        if name not in self._scorers:
            saved = self.fitted_scores
            found = None if saved is None else saved.scorer(name)
            if found is not None:
                self._scorers[name] = found
                return found
            if views not in self._training_data:
                _logger.warning(
                    "%s was not saved with this model: it is fitted now, to the training images of the "
                    "run (data.source is %s). fit_images= takes others",
                    name,
                    self.settings.data.source,
                )
                train = self._data("fit_images").train
                rows = detection.fit_rows(len(train), self.settings.ood.max_fit_images)
                extract = self.extractor(views)
                with Waiting(Console(stderr=True), f"Fitting {name}", in_logs=False):
                    features = extract(self.variables, Subset(train, rows))
                self._training_data[views] = TrainingData(features)
            self._scorers[name] = entry.make(self._training_data[views])
        return self._scorers[name]

    def _data(self, argument: str) -> Dataset:
        """The data of the run. An error names the argument that makes them unnecessary."""
        if self._dataset is None:
            try:
                dataset = load_dataset(**vars(self.settings.data))
            except (OSError, ImportError, ValueError, TypeError) as error:
                raise ValueError(
                    f"the run's own images ({self.settings.data.source}) cannot be loaded here "
                    f"({type(error).__name__}: {error}). Pass {argument}= with in-distribution images"
                ) from error
            if self.recorded_data is not None:
                instead = f"{argument}=, images that are like those of its training"
                data_record.check_loaded(self.recorded_data, dataset, instead=instead)
            self._dataset = dataset
        return self._dataset

    # --- Images ---

    def _map(self, images: Images, output: Callable[[Features], Any]) -> Any:
        """`output` of the features of every image, without JEVB's terms."""
        return self._map_checked(self._forward.checked(images), output, views="")

    @in_single_precision
    def scores_of(self, images: Images, name: str, scorer: ScoreFunction) -> np.ndarray:
        """The values of a fitted score, `[N]` float32; `[]` for one image. `Detector` calls this.

        Args:
          name: name of the score.
          scorer: the fitted score.
        """
        return self._score_checked(self._forward.checked(images), name, scorer)

    def _score_checked(self, images: GivenImages, name: str, scorer: ScoreFunction) -> np.ndarray:
        def scores(features: Features) -> Array:
            return _apply(scorer, features)

        return self._map_checked(images, scores, views=self._score_entries[name].views)

    def _map_checked(
        self, images: GivenImages, output: Callable[[Features], Any], *, views: AugmentedViews
    ) -> Any:
        whole = self._forward.of(self.variables, images, output, views=views)
        return jax.tree.map(lambda x: x[0], whole) if images.is_single else whole


def _model_again(
    config: dict[str, Any],
    variables: Any,
    step: int,
    batch_size: int,
    square_size: int,
    recorded_data: Mapping[str, Any] | None,
    read_fitted: Callable[[], FittedScores | None] | None = None,  # older pickles have none
) -> Model:
    return Model(
        config,
        variables,
        step=step,
        batch_size=batch_size,
        square_size=square_size,
        recorded_data=recorded_data,
        read_fitted=read_fitted,
    )


@jax.jit
def _apply(score: Callable[[Features], Array], features: Features) -> Array:
    return score(features)
