"""The fitted state of a run's label-free scores, saved with the run or its export.

With it, `load(...).ood_score(images)` and `.detector(...)` need no training images. A run holds
`fitted/step_N.safetensors`, arrays by name, and `fitted/step_N.json`, which says what they mean and
holds their hash and that of the encoder's weights. The JSON file is written last.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from safetensors import numpy as safetensors

from jevb_jax.evaluation import detection, score_json
from jevb_jax.evaluation.features import FeatureExtractor, Features
from jevb_jax.evaluation.score_table import (
    ScoreFunction,
    TrainingData,
    default_score,
    scores_of_run,
)
from jevb_jax.evaluation.scoring import Scorers, score_images
from jevb_jax.runs import archive
from jevb_jax.runs.archive import ArchiveError
from jevb_jax.runs.array_names import flatten_names
from jevb_jax.settings import read
from jevb_jax.settings.sections import OodSection, RunSettings

if TYPE_CHECKING:  # it imports Optax and ml_collections, which a loaded model does not need
    from jevb_jax.training.experiment import Experiment

FOLDER = "fitted"
IN_EXPORT = "fitted.safetensors"
ENTRY = "fitted"  # in the manifest of an export
_REMEDY = "evaluate the run again, or give fit_images= and calibration_images="
# Settings of the section `ood` that change neither a fitted score nor its values.
_WITHOUT_EFFECT = (
    "name",
    "outside",
    "choice",
    "corruptions",
    "severities",
    "num_corrupted_images",
    "default_score",
    "num_bootstrap",
    "human_counts_path",
)


@dataclasses.dataclass(frozen=True)
class FittedScores:
    """Fitted scores of one encoder, and their values for validation images.

    Attributes:
      weights_sha256: hash of the parameters and statistics, from `weights_sha256`.
      settings: settings of the section `ood` that the scores depend on, JSON values.
      scorers: of each fitted score, the JSON values of `score_json.describe` and the names of its
        arrays here, by their names there.
      arrays: by name. Scores that share an array share its name.
      calibration: `[n]` float32, values for the validation images, by score; also of scores that
        are not fitted.
      left_out: why a label-free score is missing, by its name.
    """

    weights_sha256: str
    settings: Mapping[str, Any]
    scorers: Mapping[str, Mapping[str, Any]]
    arrays: Mapping[str, np.ndarray]
    calibration: Mapping[str, np.ndarray]
    left_out: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        """Size of all arrays."""
        return sum(array.nbytes for array in (*self.arrays.values(), *self.calibration.values()))

    def scorer(self, name: str) -> ScoreFunction | None:
        """The fitted score, or None if it is not here.

        Raises:
          ArchiveError: this version cannot build it.
        """
        if name not in self.scorers:
            return None
        saved = self.scorers[name]
        try:
            arrays = {own: self.arrays[stored] for own, stored in saved["arrays"].items()}
            return score_json.rebuild(saved["scorer"], arrays)
        except (KeyError, score_json.SavedScoreError) as error:
            raise ArchiveError(
                f"the saved {name} is not one of this version: {error}. Remedy: {_REMEDY}"
            ) from error

    def only(self, name: str) -> "FittedScores":
        """One fitted score, and all scores that are not fitted, for an export."""
        scorers = {key: saved for key, saved in self.scorers.items() if key == name}
        used = {stored for saved in scorers.values() for stored in saved["arrays"].values()}
        return dataclasses.replace(
            self,
            scorers=scorers,
            arrays={key: array for key, array in self.arrays.items() if key in used},
            calibration={
                key: values
                for key, values in self.calibration.items()
                if key == name or key not in self.scorers
            },
        )

    def check_belongs(self, variables: Any, section: OodSection) -> None:
        """Raises an error unless the scores were fitted to features of these weights.

        Args:
          variables: parameters and running statistics of the model.
          section: settings of the model.

        Raises:
          ArchiveError: the weights or the settings are others.
        """
        found = weights_sha256(variables)
        if found != self.weights_sha256:
            raise ArchiveError(
                "the saved scores were fitted to another encoder: its weights have the SHA-256 "
                f"{self.weights_sha256[:12]}..., those of this model {found[:12]}... Remedy: {_REMEDY}"
            )
        own = settings_of_fit(section)
        changed = [name for name, value in self.settings.items() if own.get(name) != value]
        if changed:
            raise ArchiveError(
                "the saved scores were fitted with other settings than the model has: "
                + ", ".join(f"ood.{name} = {self.settings[name]!r}" for name in changed)
                + f". Remedy: {_REMEDY}"
            )


def why_no_default(settings: RunSettings, saved: Mapping[str, Any] | None) -> str:
    """Why an export cannot give its default score without images; empty if it can.

    Args:
      settings: those of the run.
      saved: the entry `ENTRY` of the export's manifest, or None. It may hold other scores alone:
        the default one may have been too large to be saved.
    """
    name = default_score(settings)
    entry = scores_of_run(settings, has_labels=False).get(name)
    if entry is None:
        return "it needs labels"
    if not entry.is_fitted or (saved is not None and name in saved["scorers"]):
        return ""
    missing = {} if saved is None else saved["left_out"]
    return missing.get(name, "the run saved no fitted scores")


def weights_sha256(variables: Any) -> str:
    """Hash of parameters and running statistics."""
    return archive.arrays_sha256(flatten_names(jax.device_get(variables)))


def settings_of_fit(section: OodSection) -> dict[str, Any]:
    """The settings that fitted scores depend on, JSON values."""
    return {
        name: value
        for name, value in read.plain(vars(section)).items()
        if name not in _WITHOUT_EFFECT
    }


# --- After the evaluation ---


def fit(
    experiment: "Experiment",
    variables: Any,
    *,
    plain: FeatureExtractor,
    with_terms: FeatureExtractor,
    train: Features,
    fitted: Scorers | None,
) -> FittedScores:
    """Fits and describes every label-free score of an evaluated encoder.

    Scores that need no augmented views are fitted to features of the plain forward pass, because `Model`
    computes the features of users' images by it. (The detection of JEVB fits them to features of
    the pass with terms. Where features hardly vary, the rounding of a pass is not small.)

    Args:
      experiment: data, networks and settings.
      variables: parameters and running statistics.
      plain: forward pass of the un-augmented image.
      with_terms: forward pass that also reads the augmented views of the run's scores.
      train: features of the training split by `plain`.
      fitted: the scores that the detection has fitted; None if there are none.
    """
    settings = experiment.settings
    table = scores_of_run(settings, has_labels=False)
    needs_views = {name: entry for name, entry in table.items() if entry.needs_views}
    without = {name: entry for name, entry in table.items() if name not in needs_views}
    rows = detection.fit_rows(len(train.representation), settings.ood.max_fit_images)
    images: Any = jax.tree.map(lambda values: values[rows], train)
    scorers = _fit_all(without, TrainingData(images))
    validation = experiment.dataset.validation
    calibration = score_images(plain, variables, validation, scorers)
    scores, left_out = dict(scorers.scores), dict(scorers.left_out)
    if needs_views:
        if fitted is None:
            features = detection.features_to_fit(experiment, variables, with_terms, train)
            fitted = _fit_all(needs_views, TrainingData(features))
        of_views = Scorers(
            {name: score for name, score in fitted.scores.items() if name in needs_views},
            frozenset(),
            {name: why for name, why in fitted.left_out.items() if name in needs_views},
            frozenset(needs_views),
        )
        calibration |= score_images(with_terms, variables, validation, of_views)
        scores |= of_views.scores
        left_out |= of_views.left_out
    return describe(
        scores,
        calibration,
        is_fitted={name for name, entry in table.items() if entry.is_fitted},
        first=default_score(settings),
        max_bytes=settings.checkpoint.fitted_megabytes * 1_000_000,
        weights=weights_sha256(variables),
        settings=settings_of_fit(settings.ood),
        left_out=left_out,
    )


def _fit_all(table: Mapping[str, Any], train: TrainingData) -> Scorers:
    """Fits every score that the data allow. Nobody asked for detection, so none is an error."""
    scores: dict[str, ScoreFunction] = {}
    left_out: dict[str, str] = {}
    for name, entry in table.items():
        try:
            scores[name] = entry.make(train)
        except ValueError as error:  # for example fewer images than ood.knn_k
            left_out[name] = str(error)
    return Scorers(scores, frozenset(), left_out)


def describe(
    scores: Mapping[str, ScoreFunction],
    calibration: Mapping[str, np.ndarray],
    *,
    is_fitted: set[str],
    first: str,
    max_bytes: int,
    weights: str,
    settings: Mapping[str, Any],
    left_out: Mapping[str, str],
) -> FittedScores:
    """Describes scores by JSON values and arrays, within a limit.

    Args:
      scores: label-free scores by name.
      calibration: `[n]`, their values for validation images.
      is_fitted: names of the scores that are fitted to images.
      first: name of the score that is taken first. The others follow by their size.
      max_bytes: limit of the arrays of the fitted scores. What exceeds it is left out.
      weights: from `weights_sha256`.
      settings: from `settings_of_fit`.
      left_out: why other scores are missing.
    """
    described = {name: score_json.describe(scores[name]) for name in scores if name in is_fitted}
    sizes = {
        name: sum(x.nbytes for x in arrays.values()) for name, (_, arrays) in described.items()
    }
    reasons = dict(left_out)
    scorers: dict[str, dict[str, Any]] = {}
    stored: dict[str, np.ndarray] = {}
    by_content: dict[str, str] = {}
    total = 0
    for name in sorted(described, key=lambda one: (one != first, sizes[one], one)):
        description, arrays = described[name]
        names: dict[str, str] = {}
        new: dict[str, str] = {}
        added: dict[str, np.ndarray] = {}
        for own, array in arrays.items():
            content = archive.arrays_sha256({"": array})
            found = by_content.get(content) or new.get(content)
            if found is None:
                found = new[content] = f"{name}/{own}"
                added[found] = array
            names[own] = found
        size = sum(array.nbytes for array in added.values())
        if total + size > max_bytes:
            reasons[name] = (
                f"its {size / 1e6:.1f} MB would exceed checkpoint.fitted_megabytes = "
                f"{max_bytes / 1e6:g}, of which {total / 1e6:.1f} are taken"
            )
            continue
        total += size
        by_content |= new
        stored |= added
        scorers[name] = {"scorer": description, "arrays": names}
    kept = {
        name: np.asarray(values, np.float32)
        for name, values in calibration.items()
        if name in scores and (name in scorers or name not in is_fitted)
    }
    return FittedScores(weights, settings, scorers, stored, kept, reasons)


# --- Files ---


def to_files(fitted: FittedScores) -> tuple[dict[str, Any], bytes]:
    """The JSON values and the bytes of the arrays."""
    values = {
        "weights_sha256": fitted.weights_sha256,
        "settings": dict(fitted.settings),
        "scorers": dict(fitted.scorers),
        "calibration": sorted(fitted.calibration),
        "left_out": dict(fitted.left_out),
    }
    arrays = {f"scorers/{name}": array for name, array in fitted.arrays.items()}
    arrays |= {f"calibration/{name}": array for name, array in fitted.calibration.items()}
    return values, safetensors.save(arrays)


def _from_files(values: Mapping[str, Any], content: bytes, where: object) -> FittedScores:
    arrays = safetensors.load(content)
    try:
        calibration = {name: arrays.pop(f"calibration/{name}") for name in values["calibration"]}
        return FittedScores(
            weights_sha256=values["weights_sha256"],
            settings=values["settings"],
            scorers=values["scorers"],
            arrays={name.removeprefix("scorers/"): array for name, array in arrays.items()},
            calibration=calibration,
            left_out=values["left_out"],
        )
    except KeyError as error:
        raise ArchiveError(
            f"the fitted scores of {where} lack {error}. Remedy: {_REMEDY}"
        ) from error


def _names(step: int) -> tuple[str, str]:
    return f"step_{step}.json", f"step_{step}.safetensors"


def write(workdir: Path, step: int, fitted: FittedScores) -> Path:
    """Writes the scores of one step of a run.

    Args:
      workdir: directory of the run, from `files.to_path`.
      step: step of the checkpoint.
      fitted: the scores.

    Returns:
      Path of the arrays.
    """
    values, content = to_files(fitted)
    manifest, arrays = _names(step)
    archive.write_described(
        workdir / FOLDER, {arrays: content}, {**values, "step": step}, manifest_name=manifest
    )
    return workdir / FOLDER / arrays


def remove_others(workdir: Path, steps: set[int]) -> None:
    """Removes the scores of steps whose checkpoints no longer exist.

    Args:
      workdir: directory of the run, from `files.to_path`.
      steps: steps to keep.
    """
    kept = {name for step in steps for name in _names(step)}
    for path in sorted((workdir / FOLDER).glob("step_*")):  # .json first
        if path.name not in kept:
            path.unlink()


def of_run(workdir: Path, step: int) -> FittedScores | None:
    """Reads the scores of one step of a run; None if it has none.

    Args:
      workdir: directory of the run, from `files.to_path`.
      step: step of the checkpoint.

    Raises:
      ArchiveError: the files are damaged or of another version.
    """
    directory = workdir / FOLDER
    name, arrays = _names(step)
    if not (directory / name).exists():
        return None
    manifest = archive.read_manifest(directory, name, remedy=_REMEDY)
    content = archive.read_file(directory, manifest, arrays, remedy=_REMEDY)
    return _from_files(manifest, content, directory / name)


def of_export(directory: Path) -> FittedScores | None:
    """Reads the scores of an export; None if it has none.

    Args:
      directory: directory of the export, from `files.to_path`.

    Raises:
      ArchiveError: the files are damaged or of another version.
    """
    if not archive.is_archive(directory):
        return None
    manifest = archive.read_manifest(directory)
    if ENTRY not in manifest:
        return None
    return _from_files(
        manifest[ENTRY], archive.read_file(directory, manifest, IN_EXPORT), directory
    )
