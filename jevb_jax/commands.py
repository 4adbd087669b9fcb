"""Training, evaluation, evaluation on other data: for the command line and for notebooks."""

import contextlib
import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from jevb_jax import loading, messages, parallel, start_weights
from jevb_jax.evaluation import accuracy, evidence, fitted_scores, readiness
from jevb_jax.evaluation import evaluate as evaluate_module
from jevb_jax.evaluation.evaluate import Evaluation, evaluate_transfer
from jevb_jax.images import data_record, workers
from jevb_jax.images.batches import gather, gather_crops
from jevb_jax.images.dataset import PICTURE_SOURCES, load_dataset
from jevb_jax.images.views import visible_views
from jevb_jax.parallel import StoppedError
from jevb_jax.report import figures, page, tables, training_curves
from jevb_jax.runs import archive, files, metrics_writers
from jevb_jax.runs.checkpoints import Checkpointer, CheckpointError, saved_steps
from jevb_jax.runs.metrics_log import MetricsLog, standard_output, unbroken
from jevb_jax.runs.provenance import environment, read_environment
from jevb_jax.runs.result_files import is_own, keep_other_results, result_files, settings_sha256
from jevb_jax.runs.waiting import Waiting
from jevb_jax.settings import read
from jevb_jax.settings.config_versions import saved_config
from jevb_jax.training import alarms, pretraining
from jevb_jax.training.experiment import Experiment, build_experiment, to_json_values
from jevb_jax.training.loop import RunLoop
from jevb_jax.training.resume import check_config, read_extensions
from jevb_jax.training.step import TrainState
from jevb_jax.xla_options import in_single_precision, keep_compiled_programs

_logger = logging.getLogger(__name__)
_NUM_SHOWN_IMAGES = 8  # in views.png


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
      ChangedDataError: the data changed since the run began (`input.accept_changed_data` allows it).
      DirectoryInUseError: another process works on the directory.
      NonFiniteError: the loss or its gradient is NaN or infinite; the state before it is written.
      CheckpointError: no checkpoint of the run can be read.
      ValueError: settings that do not fit each other.
    """
    workers.check_not_starting()
    keep_compiled_programs()
    console = console or _console()
    workdir = files.to_path(workdir)
    if os.path.isfile(workdir):
        raise NotADirectoryError(f"--workdir must be a directory, and {workdir} is a file")
    if archive.is_archive(workdir):
        raise ValueError(
            f"{workdir} holds an export or a fine-tuned encoder: give another --workdir to the run"
        )
    with Waiting(console, "Reading the data"):
        experiment = build_experiment(config)
    metrics_writers.check(experiment.settings.train.writers, workdir)
    readiness.check(experiment)
    mesh = parallel.make_mesh()
    parallel.check_divisible(
        experiment.settings.train.batch_size,
        experiment.settings.train.num_micro_batches,
        mesh,
    )
    start = None
    if experiment.settings.init.workdir and not saved_steps(workdir / "checkpoints"):
        with Waiting(console, "Reading init.workdir"):
            start = start_weights.start_variables(experiment)
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
            check_config(workdir, experiment, check_data)
            files.write_json_atomically(workdir / "environment.json", environment())

        def stop_unread(error: Exception) -> None:
            if stop.signal_name is not None:  # the same signal ended the reader
                return
            outcome = "It goes on; metrics.jsonl has every number."
            if stop.request("closed output"):
                outcome = "It saves its state and stops; the same command goes on from there."
            _logger.warning(
                "What this run prints cannot be written any more (%r). %s", error, outcome
            )

        held.enter_context(unbroken(console, stop_unread))
        with Waiting(console, "Checking the data"):
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
    """For processes other than the first: they do not hold the directory."""


def _console() -> Console:
    """Standard output of the first process; the others print nothing."""
    return standard_output(quiet=not parallel.is_main())


def _validation(experiment: Experiment, mesh: Mesh) -> Callable[[TrainState], dict[str, float]]:
    """k-NN on the validation split. Its forward pass is compiled once, at the first use."""
    extractor = functools.cache(
        lambda: evaluate_module.make_extractors(experiment, mesh=mesh).plain
    )
    return lambda state: evaluate_module.validation_knn(
        experiment, state.evaluation_variables, extractor()
    )


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
    """The rest of `train`, once process 0 holds the directory."""
    plan = pretraining.make_plan(
        experiment,
        validate=_validation(experiment, mesh),
        best_measure=accuracy.best_measure(experiment.settings.evaluation),
        start=start,
    )
    run = RunLoop(plan, workdir, console, mesh, stop, check_held)
    reasons = accuracy.left_out(experiment.settings.evaluation, experiment.dataset)
    for line in accuracy.left_out_lines(reasons):
        run.say(line)
    try:
        with Waiting(console, "Preparing the first state"):
            state = run.restore()
        for length in experiment.earlier:
            run.say(f"A run of {length.num_steps} steps until step {length.until_step}, extended.")
        if int(state.step) == 0 and parallel.is_main():
            with Waiting(console, "Drawing views.png"):
                is_drawn = _draw_views(experiment, workdir)
            if not is_drawn:
                run.say("Features have no pictures: no views.png, no galleries, no check of crops.")
        if int(state.step) < experiment.num_train_steps:
            state = run.train(state)
    finally:
        run.close()
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


def _draw_views(experiment: Experiment, workdir: Path) -> bool:
    """Writes `views.png`; False if there is nothing to see."""
    train = experiment.dataset.train
    rows = np.arange(min(_NUM_SHOWN_IMAGES, len(train)))
    examples, crops = gather(train, rows), experiment.host_crops
    shown = examples if crops is None else gather_crops(train, rows, crops.of_examples(0, rows))
    drawn = visible_views(shown, experiment.view_augmentations)
    if drawn:
        figures.save_views_figure(workdir / "views.png", examples, drawn)
    return bool(drawn)


def _evaluate_and_report(
    experiment: Experiment,
    workdir: Path,
    state: TrainState,
    console: Console,
    mesh: Mesh,
    stop: parallel.StopRequest,
    data_changes: list[str],
) -> dict[str, Any]:
    """Evaluates a state; writes results, page and fitted scores, and prints the tables."""
    reason = _why_not_fitted(experiment, workdir, data_changes)
    # Only process 0 knows whether the data changed, and all must run the same forward passes.
    keeps_fitted = parallel.as_main_says(not reason)

    def check_stop() -> None:
        if stop.is_requested():
            raise StoppedError

    try:
        with stop.interrupting(), Waiting(console, "Evaluating"):
            results, evaluation = evaluate_module.evaluate(
                experiment,
                state.evaluation_variables,
                mesh=mesh,
                check_stop=check_stop,
                keeps_fitted=keeps_fitted,
                say=lambda text: messages.say(console, text),
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
    if reason:
        messages.say(console, f"Fitted scores are not saved: {reason}")
    with Waiting(console, "Drawing the report"):
        parallel.on_main(lambda: _write_results(experiment, workdir, results, evaluation, console))
    return results


def _why_not_fitted(experiment: Experiment, workdir: Path, data_changes: list[str]) -> str:
    """Why the fitted scores of an evaluation are not those of the run; empty if they are."""
    if not experiment.settings.checkpoint.fitted_megabytes:
        return "checkpoint.fitted_megabytes is 0"
    if data_changes:
        return "the data have changed since the run began"
    path = workdir / "config.json"
    if not path.exists():
        return f"there is no {path}"
    own = read.saved_settings(saved_config(files.read_json(path), path)).ood
    if fitted_scores.settings_of_fit(own) != fitted_scores.settings_of_fit(experiment.settings.ood):
        return "the section ood has other settings than config.json, which `load` reads"
    return ""


def _write_fitted(
    workdir: Path, step: int, fitted: fitted_scores.FittedScores, console: Console
) -> None:
    path = fitted_scores.write(workdir, step, fitted)
    fitted_scores.remove_others(workdir, {step, *saved_steps(workdir / "checkpoints")})
    messages.say(
        console,
        f"Fitted scores: {fitted_scores.FOLDER}/{path.name}, {fitted.num_bytes / 1e6:.1f} MB",
    )
    for name, why in fitted.left_out.items():
        messages.say(console, f"  without {name}: {why}")


def _write_results(
    experiment: Experiment,
    workdir: Path,
    results: dict[str, Any],
    evaluation: Evaluation,
    console: Console,
) -> None:
    step = results["step"]
    suffix = "" if step == experiment.num_train_steps else f"_step_{step}"
    keep_other_results(workdir, suffix, results["settings_sha256"])
    files.write_text_atomically(workdir / f"results{suffix}.csv", tables.results_csv(results))
    records = MetricsLog.read(workdir / "metrics.jsonl")
    embedding_dim = experiment.settings.model.embedding_dim
    evaluated = experiment.settings.evaluation
    is_watched = any(alarms.logged_health(record) for record in records)
    page.write_page(
        workdir / f"report{suffix}.html",
        title=f"{experiment.settings.method} on {experiment.dataset.train.name}",
        results=results,
        num_images=len(accuracy.evaluated_split(evaluated, experiment.dataset)[1]),
        evidence=evidence.gather_evidence(experiment, evaluation),
        records=records,
        alarms=alarms.alarm_history(records, embedding_dim=embedding_dim) if is_watched else None,
        config=experiment.config,
        environment=read_environment(workdir),
    )
    if evaluation.fitted is not None:
        _write_fitted(workdir, step, evaluation.fitted, console)
    # Written last: where this file is, the others are too.
    files.write_json_atomically(workdir / f"results{suffix}.json", results)
    for copy in result_files(workdir, f"{suffix}_{results['settings_sha256'][:8]}"):
        copy.unlink(missing_ok=True)  # the same results under the longer name
    console.print(tables.classification_table(results))
    if evaluation.ood is not None:
        console.print(tables.detection_table(results))
    console.print(f"Every number: results{suffix}.csv; the page: report{suffix}.html")


@in_single_precision
def evaluate(
    config: ConfigDict, workdir: str | Path, *, step: int | None, console: Console | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run; writes its results, page and fitted scores.

    Results of other settings that lie there are renamed, not replaced (`keep_other_results`).

    Args:
      config: the config of the run. Only `evaluation`, `ood` and `input` may differ from that of the
        training.
      workdir: directory of the run.
      step: a checkpoint's step, or None for the latest.
      console: where people read.

    Returns:
      The results, as written.

    Raises:
      CheckpointError: there is no such checkpoint, or it cannot be used.
      ChangedDataError: the data changed since the run began (`input.accept_changed_data` allows it).
      StoppedError: a signal ended it.
    """
    workers.check_not_starting()
    keep_compiled_programs()
    console = console or _console()
    workdir = files.to_path(workdir)
    with Waiting(console, "Reading the data"):
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
    # An evaluation reads no state of the optimizer, whatever Optax calls its parts.
    shapes = jax.eval_shape(experiment.initial_state)._replace(opt_state=None, target_params=None)
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        shapes if shapes.ema_params is None else shapes._replace(params=None),
    )
    checkpointer = Checkpointer(workdir / "checkpoints")
    try:
        if step is None:
            restored = checkpointer.restore_latest(template, is_whole=False)
            if restored is None:
                raise CheckpointError(f"{workdir} holds no checkpoint: train first")
            _, state = restored
        elif step in checkpointer.steps():
            state = checkpointer.restore(step, template, is_whole=False)
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

    If files of that name hold other results (another step, other settings or other data; two
    directories may hold files of the same name), part of a hash is added to the name. The same call
    again replaces its own files.

    Args:
      config: the config of the run; only its section `evaluation` is read.
      section: which data, as the section `data` of a config.
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
    with Waiting(console, "Reading the checkpoint"):
        loaded = loading.load(workdir, step)
    if described.source in PICTURE_SOURCES and not described.image_size:
        # Photos are cut to the size that the encoder was trained on.
        described = dataclasses.replace(described, image_size=loaded.square_size)
    with Waiting(console, "Reading the data"):
        dataset = load_dataset(**vars(described))
    with parallel.StopRequest() as stop, stop.interrupting(), Waiting(console, "Evaluating"):
        results = evaluate_transfer(evaluation, loaded.extractor(), loaded.variables, dataset)
    results |= {
        "step": loaded.step,
        "data": read.plain(vars(described)),
        "evaluation": read.plain(vars(evaluation)),
    }
    made_of = {name: results[name] for name in ("step", "data", "evaluation")}
    # Paths are not enough to tell data apart: they may be relative, and files may be replaced.
    made_of["images"] = data_record.fingerprint(dataset)
    results["settings_sha256"] = files.json_sha256(made_of)
    name = re.sub(r"[^A-Za-z0-9]+", "_", Path(dataset.train.name).name).strip("_")
    stem = f"results_on_{name}" + ("" if step is None else f"_step_{step}")
    if not is_own(workdir / f"{stem}.json", results["settings_sha256"]):
        stem += f"_{results['settings_sha256'][:8]}"
    files.write_text_atomically(workdir / f"{stem}.csv", tables.results_csv(results))
    files.write_json_atomically(workdir / f"{stem}.json", results)
    with unbroken(console):
        console.print(tables.classification_table(results))
        messages.say(console, f"{workdir / stem}.json")
    return results
