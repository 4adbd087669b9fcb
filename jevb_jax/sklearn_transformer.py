"""JEVB on rows of numbers as a scikit-learn transformer."""

# ruff: noqa: N803 - scikit-learn calls the rows X

import contextlib
import copy
import tempfile
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from jevb_jax import arguments, parallel
from jevb_jax.configs import features as features_config
from jevb_jax.evaluation import score_table
from jevb_jax.model import Model
from jevb_jax.runs.metrics_log import standard_output
from jevb_jax.training import pretraining
from jevb_jax.training.experiment import Experiment, build_experiment
from jevb_jax.training.loop import RunLoop
from jevb_jax.xla_options import in_single_precision, keep_compiled_programs

_LEAST_ROWS = 8
_VALIDATION_SHARE = 0.1  # of the rows; a run on files holds them out, and nothing here reads them


class JEVBTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Trains JEVB on rows, without labels: `configs/features.py` with scikit-learn's names.

    Two views of a row add noise and hide columns (docs/features.md). `transform` gives the embedding,
    and `score_samples` says how ordinary rows are. Rows of a frozen encoder are the usual input, and a
    `StandardScaler` before it is not needed.

    Args:
      embedding_dim: columns of the embedding, at least 3.
      hidden_dim: width of the hidden layers of projector and inference network.
      num_epochs: passes over the rows.
      batch_size: rows of a step; all of them if there are fewer.
      learning_rate: of AdamW, at its peak.
      noise_scale: standard deviation of the noise, as a share of that of the column.
      mask_probability: how often a column is replaced by its mean, in [0, 1).
      score_name: a label-free score of a run on features, of those that read one view of a row.
      config: further settings as `{"jevb.df": 3.0}`, or None.
      random_state: of weights, views and samples: a number, a NumPy `RandomState`, or None.

    Attributes:
      model_: the trained `jevb_jax.Model`; `model_.posterior(X)` gives mean and scale.
      n_features_in_: columns of the rows.
    """

    def __init__(
        self,
        embedding_dim: int = 64,
        *,
        hidden_dim: int = 512,
        num_epochs: int = 15,
        batch_size: int = 256,
        learning_rate: float = 2e-3,
        noise_scale: float = 0.5,
        mask_probability: float = 0.2,
        score_name: str = "jevb/mixture_and_residual",
        config: dict[str, Any] | None = None,
        random_state: Any = 0,
    ):
        """See the class. Arguments are checked in `fit`, as in scikit-learn."""
        self.embedding_dim = embedding_dim
        self.hidden_dim = hidden_dim
        self.num_epochs = num_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.noise_scale = noise_scale
        self.mask_probability = mask_probability
        self.score_name = score_name
        self.config = config
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        """The embedding is float32, of rows of any type."""
        tags: Any = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def fit(self, X: Any, y: Any = None) -> Self:
        """Trains on rows, and fits the score to them.

        Args:
          X: `[N, F]`, at least eight rows.
          y: not used.

        Returns:
          The estimator.

        Raises:
          ValueError: there are too few rows, they are not finite, or a setting is out of its range.
          NonFiniteError: the loss is not finite.
          KeyboardInterrupt: Ctrl-C ended the training.
        """
        del y
        rows = self._rows(X, reset=True)
        with tempfile.TemporaryDirectory(prefix="jevb_jax_") as folder:
            experiment = self._experiment(rows, Path(folder))
            score = score_table.scores_of_run(experiment.settings, has_labels=False)[
                self.score_name
            ]
            self.model_ = _train(experiment, Path(folder))
        fitted_to = rows if score.is_fitted else None
        self._scorer = self.model_.scorer(self.score_name, fitted_to)
        self._n_features_out = self.embedding_dim
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The embedding, `[N, D]` float32: its direction and length are what JEVB models.

        Args:
          X: `[N, F]`.

        Raises:
          NotFittedError: `fit` comes first.
          ValueError: rows are not finite, or have another width than in `fit`.
        """
        check_is_fitted(self)
        return self.model_.embed(self._rows(X, reset=False))

    def score_samples(self, X: Any) -> np.ndarray:
        """How ordinary rows are, `[N]` float64; minus the score, so smaller is stranger.

        Args:
          X: `[N, F]`.

        Raises:
          NotFittedError, ValueError: as for `transform`.
        """
        check_is_fitted(self)
        rows = self._rows(X, reset=False)
        scores = self.model_.scores_of(rows, self.score_name, self._scorer)
        return -scores.astype(np.float64)

    def _rows(self, X: Any, *, reset: bool) -> np.ndarray:
        least = _LEAST_ROWS if reset else 1
        rows: Any = validate_data(
            self, X, reset=reset, ensure_min_samples=least, dtype=(np.float64, np.float32)
        )
        with np.errstate(over="ignore"):
            single = rows.astype(np.float32)
        if not np.isfinite(single).all():
            raise ValueError("X has values beyond float32 (3.4e38): scale the columns")
        return single

    def _experiment(self, rows: np.ndarray, folder: Path) -> Experiment:
        """The run on the rows, which are written to a file. A wrong setting is an error here."""
        made: Any = features_config.get_config()
        np.savez(folder / "rows.npz", features=rows)
        made.data.train_paths = (str(folder / "rows.npz"),)
        made.seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        made.data.validation_fraction = _VALIDATION_SHARE
        made.model.embedding_dim = arguments.whole_number("embedding_dim", self.embedding_dim)
        width = arguments.whole_number("hidden_dim", self.hidden_dim, at_least=1)
        made.model.projector_hidden_dims = (width,)
        made.model.head_hidden_dim = width
        made.train.num_epochs = arguments.whole_number("num_epochs", self.num_epochs, at_least=1)
        batch_size = arguments.whole_number("batch_size", self.batch_size, at_least=2)
        made.train.batch_size = min(batch_size, int(len(rows) * (1 - _VALIDATION_SHARE)))
        made.optimizer.learning_rate = arguments.real_number("learning_rate", self.learning_rate)
        made.optimizer.warmup_epochs = min(1.0, self.num_epochs / 2)
        made.feature_views.noise_scale = arguments.real_number("noise_scale", self.noise_scale)
        made.feature_views.mask_probability = arguments.real_number(
            "mask_probability", self.mask_probability
        )
        made.train.health_every_steps = 0
        made.train.writers = ()
        made.checkpoint.every_steps = 0
        made.update_from_flattened_dict(copy.deepcopy(self.config or {}))
        experiment = build_experiment(made)
        known = sorted(score_table.scores_of_run(experiment.settings, has_labels=False))
        if self.score_name not in known:
            raise ValueError(
                f"score_name must be one of {', '.join(known)}, got {self.score_name!r}"
            )
        return experiment


@in_single_precision
def _train(experiment: Experiment, folder: Path) -> Model:
    """Trains in a folder that is deleted afterwards; the model lives in memory.

    On the first device alone, as a `Model` computes, so that every number of rows fits.
    """
    keep_compiled_programs()
    plan = pretraining.make_plan(experiment, validate=lambda state: {}, best_measure="")
    console, mesh = standard_output(quiet=True), parallel.make_mesh(jax.local_devices()[:1])
    with parallel.StopRequest() as stop:
        run = RunLoop(plan, folder, console, mesh, stop, lambda: None)
        with contextlib.closing(run):
            state = run.train(run.restore())
        if int(state.step) < experiment.num_train_steps:
            raise KeyboardInterrupt(f"{stop.signal_name} ended the training")
    variables = jax.device_get(state.evaluation_variables)
    return Model(experiment.config, variables, step=int(state.step))
