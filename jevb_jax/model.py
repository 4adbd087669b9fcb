"""A trained model: `model = jevb_jax.load("runs/x")`, then `model.embed(images)`.

No file holds a pickle. A model, and a detector of it, can be pickled by those who send them to other
processes.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import methods
from jevb_jax.detector import Detector
from jevb_jax.evaluation import conformal, detection, detector_input, score_table
from jevb_jax.evaluation.features import FeatureExtractor, Features
from jevb_jax.evaluation.score_table import ScoreEntry, ScoreFunction, TrainingData
from jevb_jax.forward import ForwardPass
from jevb_jax.images import data_record
from jevb_jax.images.dataset import Dataset, load_dataset
from jevb_jax.images.given import GivenImages
from jevb_jax.images.source import Subset
from jevb_jax.networks.heads import Posterior
from jevb_jax.settings import read
from jevb_jax.training import from_settings
from jevb_jax.xla_options import in_single_precision

# Images as `Model` takes them: arrays, Pillow pictures, and lists or iterators of either.
if TYPE_CHECKING:
    from PIL.Image import Image

    Images = ArrayLike | Iterable[Any] | Image
else:  # without Pillow, which only those who give pictures need
    Images = ArrayLike | Iterable[Any]


class GaussianPosterior(NamedTuple):
    """q(z given image), a diagonal Gaussian.

    Attributes:
      mean: `[N, D]`, or `[D]` of one image.
      scale: its standard deviations, `[N, D]`.
    """

    mean: np.ndarray
    scale: np.ndarray


class Model:
    """A trained encoder, asked for images.

    Everywhere, `images` are `[N, h, w, c]`, or one image `[h, w, c]`, whose answer then has no first
    axis; a Pillow picture; or a list, a tuple or an iterator of images `[h, w, c]` and pictures, which
    may differ in size. Arrays, of NumPy, JAX or whatever NumPy reads, are uint8, or floating point in
    [0, 1]; what lies beyond by a rounding, 0.001 or one step of a coarser type, is clipped. Other
    integers are taken as levels of 0 to 255, booleans as black and white. Gray images are repeated to
    the network's channels. Pictures are decoded as the run's files were, whatever their mode, as long
    as it has 8 bits a channel.

    Any `h` and `w`. An image is prepared as those that the network was trained and evaluated on. Where
    the run's images were read to a size (`data.image_size`), its shorter side is brought to that size
    and the center square is cut out (`images.preparation`), to the same pixels as of a file. An image of
    that size, and every image where there is none, goes as it is to the view of evaluation, which brings
    the shorter side to `image_size` and takes the center. Nothing is squashed.

    Many images go through in padded batches of one size, so that each size and type of image is
    compiled once; fewer than a batch are padded to a power of two. What is said of an image depends
    neither on its place nor on the images beside it, but for rounding. A bar is shown on a terminal once
    it has taken a few seconds. Work is done on the first device of the process, in float32 even where
    the process enabled 64 bits. Models can be pickled and copied: weights and settings travel, not what
    was compiled or fitted.

    Wrong images raise: TypeError for what is neither numbers nor pictures, and for levels of an unclear
    depth (16 bits, integers of 0 and 1); ValueError for a wrong number of axes or channels, for none at
    all, for NaN, and for values out of the range.

    Attributes:
      config: what the run was trained with, plain values.
      settings: the same, typed.
      step: training step of the checkpoint, from 0.
      variables: parameters and running statistics, for use with `network.apply`.
      network: the Flax module.
      image_size: pixels a side that the network sees.
      square_size: pixels a side of the square that is cut out of images before the view, 0 for none.
      num_channels: 1 for gray images, 3 for color.
      recorded_data: what the run remembers of its data (`data_record.read`), or None.
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
    ):
        """Prepares the forward pass; `load` is the usual way here.

        Args:
          config: what the run was trained with, plain values.
          variables: parameters and running statistics.
          step: that they are from.
          batch_size: images at a time; the config's `evaluation.batch_size` by default.
          square_size: see the class; the config's `data.image_size` by default.
          recorded_data: what `data_record.read` gave; the run's own data are held to it.

        Raises:
          ValueError: a batch size below one, or numbers that are not whole.
        """
        self.config = config
        self.settings = read.saved_settings(config)
        self.step = whole_number("step", step)
        self.network = from_settings.make_network(self.settings)
        self.square_size = whole_number(
            "square_size", self.settings.data.image_size if square_size is None else square_size
        )
        if self.square_size < 0:
            raise ValueError(f"square_size must be at least 0, got {self.square_size}")
        size = whole_number(
            "batch_size", self.settings.evaluation.batch_size if batch_size is None else batch_size
        )
        if size < 1:
            raise ValueError(f"batch_size must be at least 1, got {size}")
        self._forward = ForwardPass(
            self.network, self.settings, square_size=self.square_size, batch_size=size
        )
        self.image_size = self._forward.view.size
        self.num_channels = len(self._forward.view.mean)
        self.variables = jax.device_put(variables, jax.local_devices()[0])
        self._training_data: dict[bool, TrainingData] = {}
        self._scorers: dict[str, ScoreFunction] = {}
        self._dataset: Dataset | None = None
        self.recorded_data = recorded_data

    def __reduce__(self) -> tuple[Any, ...]:
        # Neither devices nor compiled programs travel.
        state = self.config, jax.device_get(self.variables), self.step, self._forward.batch_size
        return _model_again, (*state, self.square_size, self.recorded_data)

    def __repr__(self) -> str:
        return (
            f"Model({self.settings.method}, {self.settings.model.backbone}, step {self.step}, "
            f"images {self.image_size}x{self.image_size}x{self.num_channels})"
        )

    def with_variables(self, variables: Any) -> "Model":
        """The same networks with other weights, compiled already.

        Args:
          variables: parameters and running statistics, of the same shapes.

        Returns:
          A model that shares what was compiled and nothing that was fitted.
        """
        return self._like(variables, self.square_size)

    def with_square_size(self, square_size: int) -> "Model":
        """The same model for images that were read to another size than the run's.

        Args:
          square_size: pixels a side of the square that is cut out of every image, 0 for none.

        Returns:
          A model that shares what was compiled and nothing that was fitted.
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
        other._forward = ForwardPass(
            other.network,
            other.settings,
            square_size=other.square_size,
            batch_size=self._forward.batch_size,
            compiled=self._forward,
        )
        return other

    @property
    @in_single_precision
    def extractor(self) -> FeatureExtractor:
        """All plain features of a source at once, in batches of `batch_size`; see its class."""
        return self._forward.extractor(self._forward.batch_size, has_terms=False)

    @in_single_precision
    def embed(self, images: Images) -> np.ndarray:
        """The projector's output, over which JEVB's likelihood is a density.

        Args:
          images: see the class.

        Returns:
          `[N, D]` float32, or `[D]` of one image.
        """
        return self._map(images, lambda features: features.embedding)

    @in_single_precision
    def represent(self, images: Images) -> np.ndarray:
        """The backbone's pooled output, for k-NN, linear probes and transfer.

        Args:
          images: see the class.

        Returns:
          `[N, F]` float32, or `[F]` of one image.
        """
        return self._map(images, lambda features: features.representation)

    @in_single_precision
    def posterior(self, images: Images) -> GaussianPosterior:
        """What the model believes of the latent given an image.

        Args:
          images: see the class.

        Returns:
          Mean and standard deviation.

        Raises:
          ValueError: the method has no posterior; and as the class.
        """
        if methods.METHODS[self.settings.method].head != "posterior":
            raise ValueError(f"only jevb has a posterior, and this is a {self.settings.method} run")

        def parameters(features: Features) -> GaussianPosterior:
            prediction: Posterior = features.prediction
            return GaussianPosterior(prediction.posterior_mean, prediction.posterior_scale)  # pyright: ignore[reportArgumentType]

        return self._map(images, parameters)

    @in_single_precision
    def ood_score(
        self, images: Images, score: str | None = None, *, fit_images: Images | None = None
    ) -> np.ndarray:
        """How strange images are; larger is more out of distribution.

        The scores of docs/ood.md that need no labels, as `evaluate.py` computes them. JEVB's terms
        sample views and latents: one draw serves all images, so that a score is a function of the image
        and of nothing else.

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
        checked = self._forward.checked(images)  # before a fit that may take long
        scorer = self._scorer(name, fit_images)
        return self._score_checked(checked, name, scorer)

    @in_single_precision
    def score_names(self) -> list[str]:
        """Names for `ood_score` and `detector`."""
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
          The detector, which can be saved.

        Raises:
          ValueError: fewer than `1 / false_alarm_rate - 1` calibration images; and as `ood_score`.
        """
        name = self._checked_score(score)
        rate = detector_input.checked_share("false_alarm_rate", false_alarm_rate)
        checked: GivenImages | None = None
        source: Any = None
        if calibration_images is None:
            also_fitted = fit_images is None and self._score_entries[name].is_fitted
            needed = "fit_images= and calibration_images" if also_fitted else "calibration_images"
            source = self._data(needed).validation
        else:
            checked = self._forward.checked(calibration_images)
        # What cannot have a threshold is known before the fit.
        count = len(source) if checked is None else checked.num_images
        conformal.conformal_threshold(np.zeros(count), rate)
        scorer = self._scorer(name, fit_images)
        if checked is None:
            extract = self._forward.extractor(
                self._forward.batch_size, has_terms=self._score_entries[name].needs_terms
            )
            parts = [
                np.asarray(_apply(scorer, features))[mask]
                for features, mask in extract.stream(self.variables, source)
            ]
            calibration = np.concatenate(parts)
        else:
            calibration = np.atleast_1d(self._score_checked(checked, name, scorer))
        return Detector(self, scorer, name, rate, conformal.conformal_threshold(calibration, rate))

    # --- Scores ---

    @functools.cached_property
    def _score_entries(self) -> dict[str, ScoreEntry]:
        return score_table.scores_of_run(self.settings, has_labels=False)

    def _checked_score(self, score: str | None) -> str:
        if score is None:
            score = score_table.default_score(self.settings)
        names = self.score_names()
        if score not in names:
            raise ValueError(
                f"score must be one of {names}, got {score!r}; scores of a linear probe need labels: "
                "evaluate.py computes them"
            )
        return score

    def _scorer(self, name: str, fit_images: Images | None) -> ScoreFunction:
        """A score, fitted if it has to be."""
        entry = self._score_entries[name]
        if not entry.is_fitted:
            if fit_images is not None:
                raise ValueError(f"{name} is not fitted to images: leave out fit_images")
            return entry.make(None)
        has_terms = entry.needs_terms
        if fit_images is not None:
            images = self._forward.checked(fit_images)
            if images.is_single:
                raise ValueError("fit_images must be [N, h, w, c], got one image")
            features = self._forward.of(
                self.variables, images, lambda features: features, has_terms=has_terms
            )
            return entry.make(TrainingData(features))
        if name not in self._scorers:
            if has_terms not in self._training_data:
                train = self._data("fit_images").train
                rows = detection.fit_rows(len(train), self.settings.ood.max_fit_images)
                extract = self._forward.extractor(self._forward.batch_size, has_terms=has_terms)
                self._training_data[has_terms] = TrainingData(
                    extract(self.variables, Subset(train, rows))
                )
            self._scorers[name] = entry.make(self._training_data[has_terms])
        return self._scorers[name]

    def _data(self, argument: str) -> Dataset:
        """The run's own data; an error names the argument that makes them needless."""
        if self._dataset is None:
            try:
                dataset = load_dataset(**vars(self.settings.data))
            except (OSError, ImportError, ValueError, TypeError) as error:
                raise ValueError(
                    f"the run's own images ({self.settings.data.source}) cannot be loaded here "
                    f"({type(error).__name__}: {error}): pass {argument}= with in-distribution images"
                ) from error
            if self.recorded_data is not None:
                instead = f"{argument}=, images that are like those of its training"
                data_record.check_loaded(self.recorded_data, dataset, instead=instead)
            self._dataset = dataset
        return self._dataset

    # --- Images ---

    def _map(self, images: Images, output: Callable[[Features], Any]) -> Any:
        """`output` of the plain features of every image."""
        return self._map_checked(self._forward.checked(images), output, has_terms=False)

    def scores_of(self, images: Images, name: str, scorer: ScoreFunction) -> np.ndarray:
        """A fitted score of images, as a `Detector` asks for it.

        Args:
          images: see the class.
          name: which score it is.
          scorer: the score, fitted.

        Returns:
          `[N]` float32, or `[]` of one image.
        """
        return self._score_checked(self._forward.checked(images), name, scorer)

    def _score_checked(self, images: GivenImages, name: str, scorer: ScoreFunction) -> np.ndarray:
        def scores(features: Features) -> Array:
            return _apply(scorer, features)

        return self._map_checked(images, scores, has_terms=self._score_entries[name].needs_terms)

    def _map_checked(
        self, images: GivenImages, output: Callable[[Features], Any], *, has_terms: bool
    ) -> Any:
        whole = self._forward.of(self.variables, images, output, has_terms=has_terms)
        return jax.tree.map(lambda x: x[0], whole) if images.is_single else whole


def _model_again(
    config: dict[str, Any],
    variables: Any,
    step: int,
    batch_size: int,
    square_size: int,
    recorded_data: Mapping[str, Any] | None,
) -> Model:
    return Model(
        config,
        variables,
        step=step,
        batch_size=batch_size,
        square_size=square_size,
        recorded_data=recorded_data,
    )


def whole_number(name: str, value: Any) -> int:
    """An int, of NumPy's and JAX's integers too, and of floats that pandas made of integers."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return int(value)
    number: Any = value
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(number)
    except TypeError as error:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from error


@jax.jit
def _apply(score: Callable[[Features], Array], features: Features) -> Array:
    return score(features)
