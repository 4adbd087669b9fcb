"""The only loop: trains a config in a directory, resumes what it finds there, evaluates at the end."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import logging
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from jevb_jax import health, messages, methods, model, parallel, training
from jevb_jax.compilation import in_single_precision, keep_compiled_programs
from jevb_jax.evaluation import evidence, protocol, readiness
from jevb_jax.evaluation.features import FeatureExtractor
from jevb_jax.experiment import Experiment, build_experiment, to_json_values
from jevb_jax.images import augmentations, batch_order, data_record, pixels, workers
from jevb_jax.images.batches import fits_resident, gather, load_resident, stream_batches
from jevb_jax.images.dataset import load_dataset
from jevb_jax.images.workers import ReadAhead
from jevb_jax.networks.heads import DirectionalPrediction, Posterior
from jevb_jax.networks.joint import ViewOutputs
from jevb_jax.paper.likelihood import likelihood_scale
from jevb_jax.paper.objective import ElboTerms, conditional_elbo
from jevb_jax.parallel import StoppedError
from jevb_jax.report import figures, page, tables, training_curves
from jevb_jax.runs import archive, files
from jevb_jax.runs.array_names import differences, flatten_names
from jevb_jax.runs.checkpoints import Checkpointer, CheckpointError, changed_keys, saved_steps
from jevb_jax.runs.metrics_log import MetricsLog, ProgressLine, standard_output, unbroken
from jevb_jax.settings import read
from jevb_jax.settings.saved_config import completed_finetune, saved_config, versioned
from jevb_jax.settings.sections import RunSettings

_logger = logging.getLogger(__name__)

# Settings that a resumed run may change, because no number of the run depends on them.
CHANGEABLE_ON_RESUME = (
    "checkpoint.",
    "evaluation.",
    "ood.",
    "input.accept_changed_data",
    "input.num_workers",
    "input.prefetch_batches",
    "train.extend",
    "train.health_every_steps",
    "train.health_pairs",
    "train.health_num_images",
    "train.knn_every_epochs",
    "train.log_every_steps",
)


class NonFiniteError(RuntimeError):
    """The loss or its gradient is NaN or infinite."""


class ChangedConfigError(ValueError):
    """The directory holds a run of another config."""


def environment() -> dict[str, Any]:
    """What a published number needs beside its config: command, commit, versions, devices."""
    packages = (
        "jevb-jax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "distrax",
        "orbax-checkpoint",
        "numpy",
    )
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None  # run from a checkout that is not installed
    commit, is_dirty = _own_commit(Path(__file__).resolve())
    return {
        "command": sys.argv,
        "commit": commit,
        "uncommitted_changes": is_dirty,
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "devices": [device.device_kind for device in jax.devices()],
        "backend": jax.default_backend(),
    }


def _own_commit(file: Path) -> tuple[str | None, bool]:
    """The commit of a source file and whether tracked files differ from it; None of an installed one.

    An installed package lies in the repository of whoever uses it, under `.venv` for instance, and that
    repository does not track it: its commit would be another project's.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", *arguments], cwd=file.parent, capture_output=True, text=True, check=False
        )

    try:
        if git("ls-files", "--error-unmatch", file.name).returncode != 0:
            return None, False
        is_dirty = bool(git("status", "--porcelain", "--untracked-files=no").stdout)
        return git("rev-parse", "HEAD").stdout.strip() or None, is_dirty
    except FileNotFoundError:  # no git on this machine
        return None, False


def _read_environment(workdir: Path) -> dict[str, Any]:
    """What `environment` wrote of a run; of one that was copied without it, that nobody knows."""
    path = workdir / "environment.json"
    return files.read_json(path) if path.exists() else {"command": []}


def refused_changes(saved: dict[str, Any], config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that a run in its directory may not change.

    Args:
      saved: the config of the run, completed.
      config: the config asked for.

    Returns:
      `{dotted key: (saved, asked for)}`; a larger `train.num_epochs` is none of them where
      `train.extend` allows it.
    """
    refused = {
        key: values
        for key, values in changed_keys(saved, config).items()
        if not key.startswith(CHANGEABLE_ON_RESUME)
    }
    if _is_longer(refused) and config["train"]["extend"]:
        del refused["train.num_epochs"]
    return refused


def _is_longer(changes: dict[str, tuple[Any, Any]]) -> bool:
    """Whether a run is to have more epochs than it has."""
    if "train.num_epochs" not in changes:
        return False
    saved, asked = changes["train.num_epochs"]
    return isinstance(saved, int | float) and asked > saved


# What a run writes once its config.json is there, and would replace.
_WRITTEN_LATER = (
    "checkpoints",
    "metrics.jsonl",
    "views.png",
    "curves.png",
    "results.json",
    "results.csv",
    "report.html",
)


def _check_unused(workdir: Path) -> None:
    """Refuses to begin a run where files lie that it would replace, or go on from."""
    found = [name for name in _WRITTEN_LATER if (workdir / name).exists()]
    if found:
        raise ValueError(
            f"{workdir} holds {', '.join(found)} and no config.json: a new run would replace what "
            "another program wrote there, or go on from checkpoints of settings that nobody knows. "
            "Give another --workdir, or bring the config.json of the run back"
        )


def _check_config(workdir: Path, experiment: Experiment, check_data: Callable[[], None]) -> None:
    """Writes the config of a new run; of an old one, refuses what changed, and makes it longer."""
    path, config = workdir / "config.json", experiment.config
    if not path.exists():
        _check_unused(workdir)
        check_data()
        files.write_json_atomically(path, versioned(config))
        return
    found = saved_config(files.read_json(path), path)
    refused = refused_changes(found, config)
    if refused:
        lines = [
            f"  {key}: the run has {old!r}, got {new!r}" for key, (old, new) in refused.items()
        ]
        longer = ""
        if _is_longer(refused):
            longer = (
                "\nTo train this run longer, set train.extend to True beside train.num_epochs "
                "(--config.train.extend=True): from where it stands on, its learning rate is that of "
                "a run of the new length."
            )
        raise ChangedConfigError(
            f"{workdir} holds a run of another config:\n" + "\n".join(lines) + "\n"
            "Give the same settings to resume it, or another --workdir to start anew. Only "
            f"{', '.join(CHANGEABLE_ON_RESUME)} may change.{longer}"
        )
    check_data()
    changes = changed_keys(found, config)
    if _is_longer(changes):
        _extend(workdir, round(found["train"]["num_epochs"] * experiment.steps_per_epoch))
    if changes:
        files.write_json_atomically(path, versioned(config))


_EXTENSIONS = "extensions.json"
_NUM_SHOWN_IMAGES = 8  # in views.png


def _extend(workdir: Path, num_steps: int) -> None:
    """Records where a run that becomes longer stands, and keeps what was written of the shorter one.

    Args:
      workdir: directory of the run.
      num_steps: how long the shorter run was.
    """
    stands = max(saved_steps(workdir / "checkpoints"), default=0)
    earlier: list[training.EarlierLength] = []
    start = 0
    for length in (*read_extensions(workdir), training.EarlierLength(num_steps, stands)):
        until = min(length.until_step, stands)
        if until > start:  # a length that no saved step had is none
            earlier.append(length._replace(until_step=until))
            start = until
    if not earlier:  # killed before its first save: it starts anew
        return
    for name in ("config", "environment"):
        kept = workdir / f"{name}_until_step_{stands}.json"
        if not kept.exists():
            files.write_bytes_atomically(kept, (workdir / f"{name}.json").read_bytes())
    rename_results(workdir, "", f"_step_{stands}")
    if (workdir / "curves.png").exists():
        (workdir / "curves.png").replace(workdir / f"curves_step_{stands}.png")
    files.write_json_atomically(workdir / _EXTENSIONS, [length._asdict() for length in earlier])


def read_extensions(workdir: Path) -> list[training.EarlierLength]:
    """Lengths that a run was to have before it was extended, the first one first.

    Args:
      workdir: directory of the run, of `files.to_path`.

    Returns:
      The lengths; none of a run that was never extended.
    """
    path = workdir / _EXTENSIONS
    if not path.exists():
        return []
    return [training.EarlierLength(**one) for one in files.read_json(path)]


def _result_files(workdir: Path, suffix: str) -> list[Path]:
    """Where the results of one evaluation are; JSON, which tells of the others, last."""
    names = (f"results{suffix}.csv", f"report{suffix}.html", f"results{suffix}.json")
    return [workdir / name for name in names]


def rename_results(workdir: Path, suffix: str, new_suffix: str) -> None:
    """Gives the results of one evaluation other names.

    Args:
      workdir: directory of the run, of `files.to_path`.
      suffix: of the names now: "" is `results.json`.
      new_suffix: what the names of the new results end with.
    """
    new = _result_files(workdir, new_suffix)
    for path, new_path in zip(_result_files(workdir, suffix), new, strict=True):
        if path.exists():
            path.replace(new_path)


def keep_other_results(workdir: Path, suffix: str, settings_sha256: str) -> None:
    """Copies results that those of other settings are about to replace.

    The copies have a part of their settings' hash in their names: `results_1a2b3c4d.json`.

    Args:
      workdir: directory of the run, of `files.to_path`.
      suffix: what the names of the new results end with.
      settings_sha256: of the new results' settings; older ones of the same are not kept.
    """
    path = workdir / f"results{suffix}.json"
    if not path.exists():
        return
    found = files.read_json(path)
    # Older versions wrote no hash: that of the numbers does as well.
    older = found["settings_sha256"] if "settings_sha256" in found else files.json_sha256(found)
    if older == settings_sha256:
        return
    copies = _result_files(workdir, f"{suffix}_{older[:8]}")
    for path, copy in zip(_result_files(workdir, suffix), copies, strict=True):
        if path.exists():
            files.write_bytes_atomically(copy, path.read_bytes())


def settings_sha256(config: dict[str, Any], data_changes: Sequence[str] = ()) -> str:
    """A hash of what results depend on beside the trained encoder.

    Args:
      config: of the run, plain values.
      data_changes: accepted changes of its data: results of other data are others.

    Returns:
      Hexadecimal digits.
    """
    sections = {name: config[name] for name in ("evaluation", "ood") if name in config}
    return files.json_sha256({**sections, "data": list(data_changes)} if data_changes else sections)


def _steps_per_dispatch(settings: RunSettings) -> int:
    """Steps in one compiled call: loops of convolutions are slow on the CPU alone."""
    asked = settings.train.steps_per_dispatch
    return asked or (1 if jax.default_backend() == "cpu" else 10)


class _Batches:
    """Images on the devices, and row numbers into them, for the steps of one dispatch.

    Nothing is read before the first `take`.
    """

    def __init__(self, experiment: Experiment, start_step: int, mesh: Mesh):
        self._over_data = parallel.over_data(mesh, axis=1)
        settings = experiment.settings
        source = experiment.dataset.train
        self._batch_size = settings.train.batch_size
        self._batch_indices = functools.partial(
            batch_order.batch_indices,
            num_examples=len(source),
            batch_size=self._batch_size,
            seed=settings.seed,
        )
        self._chunk_steps = _steps_per_dispatch(settings)
        placement = settings.input.placement
        fits = fits_resident(source, limit_bytes=settings.input.resident_limit_bytes)
        self._is_resident = placement == "resident" or (placement == "auto" and fits)
        self._load = lambda: parallel.put(load_resident(source), parallel.replicated(mesh))
        self._open = functools.partial(
            stream_batches,
            source,
            start_step=start_step,
            num_steps=experiment.num_train_steps - start_step,
            batch_size=self._batch_size,
            seed=settings.seed,
            num_workers=settings.input.num_workers,
            prefetch_batches=settings.input.prefetch_batches,
            rows=parallel.local_rows(self._batch_size),
        )
        self._resident: Array | None = None
        self._stream: ReadAhead[np.ndarray] | None = None

    def take(self, step: int, num_steps: int) -> tuple[Array, Array | None]:
        """What `training.make_train_chunk` takes for the next steps.

        All images and `indices [steps_per_dispatch, batch]`, or the batches themselves and None.
        """
        if self._is_resident:
            resident = self._resident = self._load() if self._resident is None else self._resident
            indices = np.zeros((self._chunk_steps, self._batch_size), np.int32)
            for row in range(num_steps):
                indices[row] = self._batch_indices(step + row)
            return resident, parallel.put(indices, self._over_data)
        if self._stream is None:
            self._stream = self._open()
        batches = [next(self._stream) for _ in range(num_steps)]
        padding = [batches[-1]] * (self._chunk_steps - num_steps)
        return parallel.put_local_rows(np.stack(batches + padding), self._over_data), None

    def close(self) -> None:
        """Ends threads and workers that read ahead."""
        if self._stream is not None:
            self._stream.close()


def _health_check(experiment: Experiment) -> Any:
    """A compiled function state -> health measures, on fixed validation images; or None.

    Every process computes it for itself, on its first device.
    """
    settings = experiment.settings.train
    embedding_dim = experiment.settings.model.embedding_dim
    source = experiment.dataset.validation
    if settings.health_every_steps <= 0:
        return None
    count = min(len(source), settings.health_num_images)
    if count <= embedding_dim:
        _logger.warning(
            "No effective rank will be logged: it needs more images than embedding_dim = %d, and the "
            "validation split gives %d. Raise data.validation_fraction or train.health_num_images.",
            embedding_dim,
            count,
        )
    if count < 2:
        _logger.warning("No health will be logged: it needs 2 validation images, got %d.", count)
        return None
    images = gather(source, np.arange(count))
    view = experiment.view_augmentations[0]

    @jax.jit
    def check(state: training.TrainState, images: Array) -> dict[str, Array]:
        views = jax.vmap(
            lambda image: pixels.center_view(image, size=view.size, mean=view.mean, std=view.std)
        )(images)
        output: Any = experiment.model.apply(state.evaluation_variables, views, train=False)
        values = health.representation_health(output.embedding)
        if isinstance(output.prediction, Posterior):
            values |= _posterior_values(experiment, state, output)
        if isinstance(output.prediction, DirectionalPrediction):
            values["concentration_mean"] = jnp.mean(output.prediction.concentration)
        if isinstance(output.prediction, Posterior | DirectionalPrediction):
            values |= _information_values(experiment, state, images)
        if settings.health_pairs:
            values |= _pair_values(experiment, state, images)
        return values

    fixed = jnp.asarray(images)
    return lambda state: check(parallel.on_local_device(state._replace(opt_state=None)), fixed)


def _posterior_values(
    experiment: Experiment, state: training.TrainState, output: ViewOutputs
) -> dict[str, Array]:
    """Posteriors of the images, their scales' floor and the width of the radial likelihood."""
    settings: methods.JevbSettings = experiment.jevb_settings
    min_scale = experiment.settings.model.min_scale
    mean, scale = output.posterior_mean, output.posterior_scale
    summary = health.posterior_summary(mean, scale, prior_scale=settings.prior_scale)
    values = {f"posterior_{name}": value for name, value in summary._asdict().items()}
    values["posterior_scale_at_floor"] = health.share_at_floor(scale, min_scale=min_scale)
    likelihood = output.prediction.likelihood_scale
    if likelihood is not None:  # untied: a head of its own, with the same floor
        values["likelihood_scale_at_floor"] = health.share_at_floor(likelihood, min_scale=min_scale)
    width: Any = experiment.model.apply(state.evaluation_variables, method="radial_scale")
    if settings.likelihood.space == "linear":  # a length there: relative to the radii
        log_radius = health.embedding_log_radius(output.embedding)
        width = width / (jnp.exp(log_radius) * np.sqrt(mean.shape[-1]))
    values["radial_width"] = width
    return values


def _two_views(
    experiment: Experiment, state: training.TrainState, images: Array
) -> tuple[ViewOutputs, ViewOutputs]:
    """Outputs of two augmented views of the images, always the same two."""
    views = augmentations.multi_view(
        jax.random.split(jax.random.key(0), len(images)), images, experiment.view_augmentations[:2]
    )
    apply: Any = functools.partial(experiment.model.apply, state.evaluation_variables)
    source, target = (apply(view, train=False) for view in views)
    return source, target


def _information_values(
    experiment: Experiment, state: training.TrainState, images: Array
) -> dict[str, Array]:
    """What one view tells of the other by the method's likelihood, and the likelihood's mass."""
    views = _two_views(experiment, state, images)
    radial_scale: Any = None
    if experiment.model.initial_radial_scale is not None:
        radial_scale = experiment.model.apply(state.evaluation_variables, method="radial_scale")
    keys = jax.random.split(jax.random.key(0), len(images))
    output = experiment.method(keys, views, views, step=state.step, radial_scale=radial_scale)
    names = ("predictive_information", "directional_log_mass")
    return {name: jnp.mean(output.metrics[name]) for name in names if name in output.metrics}


def _pair_values(
    experiment: Experiment, state: training.TrainState, images: Array
) -> dict[str, Array]:
    """What JEVB's objective sees of two augmented views of the images."""
    settings: methods.JevbSettings = experiment.jevb_settings
    key = jax.random.key(0)
    source, target = _two_views(experiment, state, images)
    apply: Any = functools.partial(experiment.model.apply, state.evaluation_variables)

    def terms_of(representation: Array) -> ElboTerms:
        view = apply(representation, train=False, method="outputs_of")
        return conditional_elbo(
            key,
            target.embedding,
            view.posterior_mean,
            view.posterior_scale,
            settings.likelihood_at(apply(method="radial_scale")),
            untied_scale=settings.untied_scale(view),
            **settings.elbo_settings(state.step),
        )

    mean, scale = source.posterior_mean, source.posterior_scale
    untied = settings.untied_scale(source)
    likelihood = settings.likelihood
    own_scale = scale if untied is None else jnp.broadcast_to(jnp.asarray(untied), scale.shape)
    noise = jax.random.normal(key, mean.shape) * (settings.location == "sample")
    pairs = health.pair_health(
        target.embedding,
        mean + scale * noise,
        likelihood_scale(own_scale, scale_units=likelihood.scale_units),
        df=likelihood.df,
    )
    gradients = health.term_gradient_norms(terms_of, source.representation)
    return {
        **{f"pair_{name}": value for name, value in pairs._asdict().items()},
        **{f"gradient_{name}": value for name, value in gradients.items()},
    }


def _write_evidence(workdir: Path, experiment: Experiment, state: training.TrainState) -> Path:
    """Sets aside the state before a step that was not finite, and what its batch was."""
    step = int(state.step)
    directory = workdir / f"nonfinite_step_{step}"
    arrays = parallel.to_host(flatten_names(state))
    if not parallel.is_main():
        return directory
    directory.mkdir(exist_ok=True)
    files.write_arrays_atomically(directory / "state.npz", arrays)
    settings = experiment.settings
    indices = batch_order.batch_indices(
        step,
        num_examples=len(experiment.dataset.train),
        batch_size=settings.train.batch_size,
        seed=settings.seed,
    )
    step_key = jax.random.fold_in(experiment.key, step)
    files.write_json_atomically(
        directory / "batch.json",
        {
            "step": step,
            "seed": settings.seed,
            "step_key": np.asarray(jax.random.key_data(step_key)).tolist(),
            "train_indices": indices.tolist(),
        },
    )
    return directory


def _status(metrics: dict[str, float], rank: float | None, images_per_second: float) -> str:
    values = {name.removeprefix("train/"): value for name, value in metrics.items()}
    texts = [f"{images_per_second:,.0f} images/s  loss {values.pop('loss'):.4f}"]
    del values["gradient_norm"]
    values.pop("learning_rate", None)
    texts += [f"{n.removesuffix('_log_likelihood')} {v:.3g}" for n, v in values.items()]
    if rank is not None:
        texts.append(f"rank {rank:.1f}")
    return "  ".join(texts)


def _next_boundary(step: int, *intervals: int) -> int:
    """The first step after `step` that is a multiple of any interval."""
    return min((step // interval + 1) * interval for interval in intervals)


class _SpeedMeter:
    """Images a second over intervals of a second or more; metrics of steps may arrive in bursts."""

    def __init__(self) -> None:
        self.images_per_second = 0.0
        self._num_images = 0
        self._start = time.monotonic()

    def add(self, num_images: int) -> None:
        self._num_images += num_images
        seconds = time.monotonic() - self._start
        if seconds >= 1 or not self.images_per_second:
            self.images_per_second = self._num_images / seconds
            self._num_images = 0
            self._start = time.monotonic()


class _Dispatch(NamedTuple):
    """Steps handed to the device, whose metrics are still to be fetched."""

    first_step: int
    num_steps: int
    metrics: dict[str, Array]
    is_finite: Array


class _Run:
    """One process's work on a run directory."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        console: Console,
        mesh: Mesh,
        stop: parallel.StopRequest,
        check_held: Callable[[], None],
        start: dict[str, Any] | None = None,
    ):
        self.experiment = experiment
        self.start = start
        self.mesh = mesh
        self.check_held = check_held
        self.stop = stop
        self.embedding_dim = experiment.settings.model.embedding_dim
        self.workdir = workdir
        self.console = console
        self.log = MetricsLog(workdir, is_writer=parallel.is_main())
        settings = experiment.settings.checkpoint
        self.checkpointer = Checkpointer(
            workdir / "checkpoints",
            keep_latest=settings.keep_latest,
            keep_best=settings.keep_best,
            keep_steps=[length.until_step for length in experiment.earlier],
        )
        self.rank: float | None = None
        self.alarms: dict[str, str] = {}  # raised at the last health check: messages by name
        self.check_health = _health_check(experiment)
        self.learning_rate = jax.jit(experiment.schedule)
        self.latest_knn: tuple[int, dict[str, float]] | None = None  # step, accuracies

    def shardings(self, state: training.TrainState) -> training.TrainState:
        """How the state lies over the devices."""
        is_cut = self.experiment.settings.train.shard_optimizer_state
        return training.state_shardings(state, self.mesh, shard_optimizer_state=is_cut)

    def restore(self) -> training.TrainState:
        """The latest whole checkpoint's state, or the initial one."""
        template = self.experiment.initial_state()
        template = parallel.put(template, self.shardings(template))
        restored = self.checkpointer.restore_latest(template)
        step, state = (0, template) if restored is None else restored
        if restored is not None:
            self.checkpointer.discard_after(step)
            self.say(f"Resuming {self.workdir} at step {step}.")
        self.log.truncate_after(step)
        for record in MetricsLog.read(self.workdir / "metrics.jsonl"):
            if values := health.logged_health(record):
                alarms = health.health_alarms(
                    values, step=record["step"], embedding_dim=self.embedding_dim
                )
                self.alarms = {alarm.name: alarm.message for alarm in alarms}
        if restored is None and self.start is not None:
            state = parallel.put(_started_from(template, self.start), self.shardings(template))
            self.save(state)  # whatever becomes of the other run, this one starts here
        return state

    def save(self, state: training.TrainState) -> None:
        """Starts a checkpoint of a state whose metrics are known to be finite."""
        parallel.on_main(self.check_held)
        score = None
        if self.experiment.settings.checkpoint.keep_best:
            measure = protocol.best_measure(self.experiment.settings.evaluation)
            score = self.validation_knn(state)[measure]
            self.log.write(int(state.step), {"validation/knn_accuracy": score})
        self.log.flush()
        self.checkpointer.save(int(state.step), state, config=self.experiment.config, score=score)

    def record(self, dispatch: _Dispatch, state: training.TrainState) -> dict[str, float]:
        """Fetches a dispatch's metrics, logs them, and stops on a step that was not finite.

        `state` is the latest one, which no later dispatch has consumed.
        """
        first_step, num_steps, metrics, is_finite = jax.device_get(dispatch)
        rows = num_steps if is_finite else int(state.step) - first_step + 1
        every = self.experiment.settings.train.log_every_steps
        values: dict[str, float] = {}
        for row in range(rows):
            step = first_step + row + 1
            values = {f"train/{name}": float(array[row]) for name, array in metrics.items()}
            is_bad = not is_finite and row == rows - 1
            if (every and step % every == 0) or step == self.experiment.num_train_steps or is_bad:
                values["train/learning_rate"] = float(self.learning_rate(np.int32(step - 1)))
                self.log.write(step, values)
        if not is_finite:
            directory = _write_evidence(self.workdir, self.experiment, state)
            raise NonFiniteError(
                f"step {int(state.step)}: the loss is {values['train/loss']} and the norm of "
                f"its gradient {values['train/gradient_norm']}. Nothing was saved after it; the state "
                f"before the step and the keys of its batch are in {directory}. Lower "
                "optimizer.learning_rate, lengthen optimizer.warmup_epochs or set "
                "optimizer.max_gradient_norm, and start in another directory."
            )
        return values

    @functools.cached_property
    def extractor(self) -> FeatureExtractor:
        """The forward pass of k-NN, compiled once for the run."""
        return protocol.make_extractors(self.experiment, mesh=self.mesh).plain

    def validation_knn(self, state: training.TrainState) -> dict[str, float]:
        """k-NN accuracies of a state by name, computed once a step; all processes do."""
        step = int(state.step)
        if self.latest_knn is None or self.latest_knn[0] != step:
            accuracies = protocol.validation_knn(
                self.experiment, state.evaluation_variables, self.extractor
            )
            self.latest_knn = step, accuracies
        return self.latest_knn[1]

    def record_knn(self, state: training.TrainState) -> None:
        """Logs the k-NN accuracies of a state."""
        values = self.validation_knn(state)
        self.log.write(
            int(state.step), {f"validation/{name}": value for name, value in values.items()}
        )

    def record_health(self, state: training.TrainState) -> None:
        """Logs the health of a state and its alarms; says which alarms rose or cleared."""
        step = int(state.step)
        values = {name: float(value) for name, value in self.check_health(state).items()}
        judged = health.judge(values, step=step, embedding_dim=self.embedding_dim)
        self.rank = values.get("effective_rank")
        values |= {f"alarm_{name}": float(message is not None) for name, message in judged.items()}
        self.log.write(step, {f"health/{name}": value for name, value in values.items()})
        raised = {name: message for name, message in judged.items() if message is not None}
        for name, message in raised.items():
            if name not in self.alarms:
                self.say(f"Health alarm at step {step}, {name}: {message}")
        for name in self.alarms:
            if name not in raised:
                self.say(f"Health alarm cleared at step {step}: {name}")
        self.alarms = raised

    def say(self, text: str) -> None:
        """Prints a line in which nothing is markup, whatever the width."""
        messages.say(self.console, text)

    def train(self, state: training.TrainState) -> training.TrainState:
        """Runs the loop from a state to the end of the run or to a request to stop."""
        settings = self.experiment.settings.train
        num_steps = self.experiment.num_train_steps
        health_every = settings.health_every_steps if self.check_health is not None else 0
        save_every = self.experiment.settings.checkpoint.every_steps
        knn_every = settings.knn_every_epochs * self.experiment.steps_per_epoch
        boundaries = [every for every in (health_every, save_every, knn_every) if every]
        chunk = training.make_train_chunk(
            self.experiment.train_step, mesh=self.mesh, shardings=self.shardings(state)
        )
        step = int(state.step)
        batches = _Batches(self.experiment, step, self.mesh)
        key = parallel.put_key(self.experiment.key, self.mesh)
        pending: _Dispatch | None = None
        is_finite = parallel.put(np.asarray(True), parallel.replicated(self.mesh))
        is_stopping = False
        meter = _SpeedMeter()
        with (
            contextlib.closing(batches),
            ProgressLine(self.console, total_steps=num_steps, initial_step=step) as progress,
        ):

            def settle(dispatch: _Dispatch) -> None:
                values = self.record(dispatch, state)
                meter.add(dispatch.num_steps * settings.batch_size)
                end = dispatch.first_step + dispatch.num_steps
                progress.update(end, _status(values, self.rank, meter.images_per_second))

            while step < num_steps and not is_stopping:
                count = min(_steps_per_dispatch(self.experiment.settings), num_steps - step)
                if boundaries:
                    count = min(count, _next_boundary(step, *boundaries) - step)
                try:
                    with self.stop.interrupting():
                        images, indices = batches.take(step, count)
                except StoppedError:
                    break
                # After a bad step, known so far to the device only, nothing more runs.
                allowed = jnp.where(is_finite, np.int32(count), np.int32(0))
                state, metrics, is_finite = chunk(state, images, indices, allowed, key)
                # The metrics of the dispatch before are fetched while this one computes.
                if pending is not None:
                    settle(pending)
                pending = _Dispatch(step, count, metrics, is_finite)
                step += count
                is_save = save_every and step % save_every == 0
                is_last = step == num_steps
                is_health = health_every and (step % health_every == 0 or is_last)
                is_knn = knn_every and (step % knn_every == 0 or is_last)
                if is_save or is_health or is_knn:
                    settle(pending)
                    pending = None
                if is_health:
                    self.record_health(state)
                if is_knn:
                    self.record_knn(state)
                is_stopping = self.stop.is_requested()
                if is_save and step < num_steps and not is_stopping:
                    self.save(state)
            if pending is not None:
                settle(pending)
            # Before the workers are ended, which may take them a while.
            self.save(state)
            self.checkpointer.wait()
        if health_every and step == num_steps >= health.ALARM_WARMUP_STEPS:
            lines = [f"  {name}: {message}" for name, message in self.alarms.items()]
            self.say("\n".join([f"Health alarms at the end: {len(lines) or 'none'}", *lines]))
        return state


def _start_variables(experiment: Experiment) -> dict[str, Any]:
    """Parameters and statistics of the encoder that `init.workdir` names.

    Raises:
      ValueError: they are those of another network; every difference is named.
    """
    settings = experiment.settings.init
    loaded = model.load(settings.workdir, None if settings.step < 0 else settings.step)
    shapes = jax.eval_shape(experiment.initial_state)
    wanted = {"params": shapes.params, "batch_stats": shapes.batch_stats}
    problems = differences(
        flatten_names(loaded.variables), flatten_names(wanted), where="init.workdir"
    )
    if problems:
        raise ValueError(
            f"init.workdir = {settings.workdir} holds another network:\n"
            + "\n".join(problems)
            + "\nGive the method and the section model of that run, or leave init.workdir empty."
        )
    return loaded.variables


def _started_from(state: training.TrainState, variables: dict[str, Any]) -> training.TrainState:
    """A state before the first step with the weights of another run, averages likewise."""

    def copied(tree: Any) -> Any:  # each its own memory: a step gives away what it is passed
        return jax.tree.map(jnp.copy, tree)

    params = variables["params"]
    return state._replace(
        params=copied(params),
        batch_stats=copied(variables["batch_stats"]),
        ema_params=None if state.ema_params is None else copied(params),
        target_params=None
        if state.target_params is None
        else copied({name: params[name] for name in state.target_params}),
    )


@in_single_precision
def train(config: ConfigDict, workdir: str | Path, *, console: Console | None = None) -> bool:
    """Trains, or resumes, the run of `config` in `workdir`, and evaluates it at the end.

    Args:
      config: see `configs/default.py`.
      workdir: directory of the run; made if it does not exist, resumed if it holds this run.
      console: where people read; standard output by default.

    Returns:
      True when the run is complete, False when a signal stopped it after a save.

    Raises:
      ChangedConfigError: the directory holds a run of another config.
      ChangedDataError: its data are not those that it started on (`input.accept_changed_data`).
      DirectoryInUseError: another process works on the directory.
      NonFiniteError: the loss or its gradient is NaN or infinite; the evidence is set aside.
      CheckpointError: no checkpoint of the run can be read.
      ValueError: settings that do not fit each other.
    """
    workers.check_not_starting()
    keep_compiled_programs()
    console = console or _console()
    workdir = files.to_path(workdir)
    if archive.is_archive(workdir):
        raise ValueError(
            f"{workdir} holds an export or a fine-tuned encoder: give another --workdir to the run"
        )
    experiment = build_experiment(config)
    readiness.check(experiment)
    mesh = parallel.make_mesh()
    parallel.check_divisible(
        experiment.settings.train.batch_size,
        experiment.settings.train.num_micro_batches,
        mesh,
    )
    start = None
    if experiment.settings.init.workdir and not saved_steps(workdir / "checkpoints"):
        start = _start_variables(experiment)
    with contextlib.ExitStack() as held, parallel.StopRequest() as stop:
        check_held: Callable[[], None] = _check_nothing
        data_changes: list[str] = []

        def check_data() -> None:
            accept = experiment.settings.input.accept_changed_data
            data_changes.extend(
                data_record.check_training(workdir, experiment.dataset, accept_change=accept)
            )

        def prepare() -> None:
            nonlocal check_held
            workdir.mkdir(parents=True, exist_ok=True)
            check_held = held.enter_context(files.lock_directory(workdir))
            _check_config(workdir, experiment, check_data)
            files.write_json_atomically(workdir / "environment.json", environment())

        def stop_unread(error: Exception) -> None:
            if stop.signal_name is not None:  # the reader was stopped too
                return
            outcome = "It goes on; metrics.jsonl has every number."
            if stop.request("closed output"):
                outcome = "It saves its state and stops; the same command goes on from there."
            _logger.warning(
                "What this run prints cannot be written any more (%r). %s", error, outcome
            )

        held.enter_context(unbroken(console, stop_unread))
        parallel.on_main(prepare)
        if not stop.is_heeding:
            console.print(
                "This is not the main thread: SIGTERM and Ctrl-C will not save the state of the run. "
                "After them, the same command goes on from the last checkpoint."
            )
        extended = experiment.extended(read_extensions(workdir))
        return _train_and_evaluate(
            extended, workdir, console, mesh, stop, check_held, data_changes, start
        )


def _check_nothing() -> None:
    """The check of processes beside the first, which hold no directory."""


def _console() -> Console:
    """Standard output, of one process."""
    return standard_output(quiet=not parallel.is_main())


def _train_and_evaluate(
    experiment: Experiment,
    workdir: Path,
    console: Console,
    mesh: Mesh,
    stop: parallel.StopRequest,
    check_held: Callable[[], None],
    data_changes: list[str],
    start: dict[str, Any] | None,
) -> bool:
    """`train` in a directory that process 0 holds."""
    run = _Run(experiment, workdir, console, mesh, stop, check_held, start)
    reasons = protocol.left_out(experiment.settings.evaluation, experiment.dataset)
    for line in protocol.left_out_lines(reasons):
        run.say(line)
    try:
        state = run.restore()
        for length in experiment.earlier:
            run.say(f"A run of {length.num_steps} steps until step {length.until_step}, extended.")
        if int(state.step) == 0 and parallel.is_main():
            train = experiment.dataset.train
            images = gather(train, np.arange(min(_NUM_SHOWN_IMAGES, len(train))))
            views = augmentations.visible_views(images, experiment.view_augmentations)
            figures.save_views_figure(workdir / "views.png", images, views)
        if int(state.step) < experiment.num_train_steps:
            state = run.train(state)
    finally:
        try:
            run.checkpointer.close()
        finally:
            run.log.close()
    step, last = int(state.step), experiment.num_train_steps
    again = "the same command goes on from there."
    if step < last:
        run.say(f"{stop.signal_name}: saved step {step} of {last} in {workdir}; {again}")
        return False
    if parallel.is_main():
        training_curves.save_curves_figure(
            workdir / "curves.png", MetricsLog.read(workdir / "metrics.jsonl")
        )
    try:
        _evaluate_and_report(experiment, workdir, state, console, mesh, stop, data_changes)
    except StoppedError:
        run.say(f"{stop.signal_name}: trained to the end, not yet evaluated; {again}")
        return False
    messages.say(console, f"Run files: {workdir}")
    return True


def _evaluate_and_report(
    experiment: Experiment,
    workdir: Path,
    state: training.TrainState,
    console: Console,
    mesh: Mesh,
    stop: parallel.StopRequest,
    data_changes: list[str],
) -> dict[str, Any]:
    """Evaluates a state; writes `results.json`, `results.csv` and `report.html`, prints the tables."""

    def check_stop() -> None:
        if stop.is_requested():
            raise StoppedError

    try:
        with stop.interrupting():
            results, evaluation = protocol.evaluate(
                experiment, state.evaluation_variables, mesh=mesh, check_stop=check_stop
            )
    except StoppedError as error:
        raise StoppedError(
            f"{stop.signal_name}: the evaluation of {workdir} was stopped"
        ) from error
    results["step"] = int(state.step)
    if data_changes:
        results["data_changes"] = data_changes
    if earlier := read_extensions(workdir):
        results["earlier_lengths"] = [length._asdict() for length in earlier]
    results["settings_sha256"] = settings_sha256(experiment.config, data_changes)
    parallel.on_main(lambda: _write_results(experiment, workdir, results, evaluation, console))
    return results


def _write_results(
    experiment: Experiment,
    workdir: Path,
    results: dict[str, Any],
    evaluation: protocol.Evaluation,
    console: Console,
) -> None:
    step = results["step"]
    suffix = "" if step == experiment.num_train_steps else f"_step_{step}"
    keep_other_results(workdir, suffix, results["settings_sha256"])
    files.write_text_atomically(workdir / f"results{suffix}.csv", tables.results_csv(results))
    records = MetricsLog.read(workdir / "metrics.jsonl")
    embedding_dim = experiment.settings.model.embedding_dim
    is_watched = any(health.logged_health(record) for record in records)
    page.write_page(
        workdir / f"report{suffix}.html",
        title=f"{experiment.config['method']} on {experiment.dataset.train.name}",
        results=results,
        evidence=evidence.gather_evidence(experiment, evaluation),
        records=records,
        alarms=health.alarm_history(records, embedding_dim=embedding_dim) if is_watched else None,
        config=experiment.config,
        environment=_read_environment(workdir),
    )
    # The last of the files: who finds it finds the others.
    files.write_json_atomically(workdir / f"results{suffix}.json", results)
    for copy in _result_files(workdir, f"{suffix}_{results['settings_sha256'][:8]}"):
        copy.unlink(missing_ok=True)  # of the same settings, from before others took the name
    console.print(tables.classification_table(results))
    if evaluation.ood is not None:
        console.print(tables.detection_table(results))
    console.print(f"Every number: results{suffix}.csv; the page: report{suffix}.html")


@in_single_precision
def evaluate(
    config: ConfigDict, workdir: str | Path, *, step: int | None, console: Console | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run; writes `results.json`, `results.csv` and `report.html`.

    Results of other settings that have these names are kept under others (`keep_other_results`).

    Args:
      config: the config of the run; only `evaluation`, `ood` and `input` may differ from what it was
        trained with.
      workdir: directory of the run.
      step: a checkpoint's step, or None for the latest.
      console: where people read.

    Returns:
      The results, as written.

    Raises:
      CheckpointError: there is no such checkpoint, or it cannot be used.
      ChangedDataError: its data are not those that it started on (`input.accept_changed_data`).
      StoppedError: a signal ended it.
    """
    workers.check_not_starting()
    keep_compiled_programs()
    console = console or _console()
    workdir = files.to_path(workdir)
    experiment = build_experiment(config)
    data_changes = data_record.check_evaluation(
        workdir,
        experiment.dataset,
        accept_change=experiment.settings.input.accept_changed_data,
    )
    readiness.check(experiment)
    if not (workdir / "environment.json").exists():
        _logger.warning(
            "%s holds no environment.json: the report cannot say with which versions and devices it "
            "was trained.",
            workdir,
        )
    mesh = parallel.make_mesh()
    replicated = parallel.replicated(mesh)
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        jax.eval_shape(experiment.initial_state),
    )
    checkpointer = Checkpointer(workdir / "checkpoints")
    try:
        if step is None:
            restored = checkpointer.restore_latest(template)
            if restored is None:
                raise CheckpointError(f"{workdir} holds no checkpoint: train first")
            _, state = restored
        elif step in checkpointer.steps():
            state = checkpointer.restore(step, template)
        else:
            raise CheckpointError(f"{workdir} has checkpoints {checkpointer.steps()}, not {step}")
    finally:
        checkpointer.close()
    with parallel.StopRequest() as stop, unbroken(console):
        results = _evaluate_and_report(
            experiment, workdir, state, console, mesh, stop, data_changes
        )
        messages.say(console, f"Run files: {workdir}")
    return results


@in_single_precision
def evaluate_on(
    config: ConfigDict,
    section: ConfigDict,
    workdir: str | Path,
    *,
    step: int | None,
    console: Console | None = None,
) -> dict[str, Any]:
    """k-NN and linear probes of a run's encoder on other data; writes `results_on_NAME.json`, `.csv`.

    Where that name is taken by results of other data (files in two directories may have one name),
    another step or other settings, a part of a hash of these is added to it. The same call again
    replaces its own files.

    Args:
      config: of the run, for its section `evaluation`.
      section: `data` of a config.
      workdir: directory of the run.
      step: a checkpoint's step, or None for the latest.
      console: where people read.

    Returns:
      The results, as written.

    Raises:
      CheckpointError: there is no such checkpoint, or it cannot be used.
      ValueError: data that cannot be loaded, have no labels or do not fit; more than one process.
    """
    workers.check_not_starting()
    keep_compiled_programs()
    console = console or _console()
    if jax.process_count() > 1:
        raise ValueError(f"other data are evaluated by one process, got {jax.process_count()}")
    workdir = files.to_path(workdir)
    described = read.data_section(to_json_values(section))
    evaluation = read.evaluation_section(to_json_values(config)["evaluation"])
    loaded = model.load(workdir, step)
    if described.source in ("folder", "tfds") and not described.image_size:
        # Photos are cut as the encoder's own were.
        described = dataclasses.replace(described, image_size=loaded.square_size)
    dataset = load_dataset(**vars(described))
    with parallel.StopRequest() as stop, stop.interrupting():
        results = protocol.evaluate_transfer(
            evaluation, loaded.extractor, loaded.variables, dataset
        )
    results |= {
        "step": loaded.step,
        "data": read.plain(vars(described)),
        "evaluation": read.plain(vars(evaluation)),
    }
    made_of = {name: results[name] for name in ("step", "data", "evaluation")}
    # Paths do not tell data apart: relative ones, and files that were replaced.
    made_of["images"] = data_record.fingerprint(dataset)
    results["settings_sha256"] = files.json_sha256(made_of)
    name = re.sub(r"[^A-Za-z0-9]+", "_", Path(dataset.train.name).name).strip("_")
    stem = f"results_on_{name}" + ("" if step is None else f"_step_{step}")
    if not _is_own(workdir / f"{stem}.json", results["settings_sha256"]):
        stem += f"_{results['settings_sha256'][:8]}"
    files.write_text_atomically(workdir / f"{stem}.csv", tables.results_csv(results))
    files.write_json_atomically(workdir / f"{stem}.json", results)
    with unbroken(console):
        console.print(tables.classification_table(results))
        messages.say(console, f"{workdir / stem}.json")
    return results


def _is_own(path: Path, settings_sha256: str) -> bool:
    """Whether results of these settings may be written to a path: nothing there, or the same's."""
    if not path.exists():
        return True
    found = files.read_json(path)
    return "settings_sha256" in found and found["settings_sha256"] == settings_sha256


def load_config(workdir: str | Path) -> ConfigDict:
    """The config of a run directory.

    Args:
      workdir: directory of the run.

    Returns:
      The config, locked. Lists are tuples again.

    Raises:
      FileNotFoundError: no run was started there.
    """
    path = files.to_path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: --workdir must be a directory of train.py")
    config = read_config(path)
    config.lock()
    return config


def read_config(path: str | Path) -> ConfigDict:
    """The config that a run saved, to be changed and given again.

    Args:
      path: a `config.json`; or the `model.json` of a fine-tune or an export.

    Returns:
      The config, not locked. Lists are tuples again, and settings that did not exist yet are as they
      were then.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a config.
    """

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tuples(item) for key, item in value.items()}
        return tuple(tuples(item) for item in value) if isinstance(value, list) else value

    path = files.to_path(path)
    found = files.read_json(path)
    if path.name == archive.MANIFEST and isinstance(found, dict):
        if "finetuned" in found:
            return ConfigDict(tuples(completed_finetune(found["finetuned"])))
        found = found.get("config")
    return ConfigDict(tuples(saved_config(found, path)))
