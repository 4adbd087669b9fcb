"""What may change when a run or a fine-tune is resumed, and how a run is made longer."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jevb_jax.runs import files, metrics_writers
from jevb_jax.runs.checkpoints import changed_keys, saved_steps
from jevb_jax.runs.result_files import rename_results
from jevb_jax.settings import read
from jevb_jax.settings.config_versions import saved_config, saved_finetune, versioned
from jevb_jax.training.experiment import Experiment
from jevb_jax.training.optimizers import EarlierLength

# Settings that may change on resuming, because no number that training computes depends on them.
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
    "train.writers",
)
FINETUNE_CHANGEABLE_ON_RESUME = (
    "checkpoint.",
    "evaluation.",
    "init.step",
    "init.workdir",
    "input.num_workers",
    "input.prefetch_batches",
    "train.log_every_steps",
    "train.writers",
)


class ChangedConfigError(ValueError):
    """The directory holds a run, or a fine-tune, of another config."""


def refused_changes(saved: dict[str, Any], config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Changed settings with which a run may not be resumed.

    Args:
      saved: the config of the run, completed.
      config: the config asked for.

    Returns:
      `{dotted key: (saved, asked for)}`. A larger `train.num_epochs` is left out where `train.extend`
      allows it.
    """
    refused = {
        key: values
        for key, values in changed_keys(saved, config).items()
        if not key.startswith(CHANGEABLE_ON_RESUME)
    }
    if is_longer(refused) and read.saved_settings(config).train.extend:
        del refused["train.num_epochs"]
    return refused


def is_longer(changes: dict[str, tuple[Any, Any]]) -> bool:
    """Whether a run is to have more epochs than it has."""
    if "train.num_epochs" not in changes:
        return False
    saved, asked = changes["train.num_epochs"]
    return isinstance(saved, int | float) and asked > saved


# What a run writes after its config.json. A new run would replace these files.
_WRITTEN_LATER = (
    "checkpoints",
    "metrics.jsonl",
    "views.png",
    "curves.png",
    "results.json",
    "results.csv",
    "report.html",
    "fitted",
    "training",  # an unfinished fine-tune
    metrics_writers.IDENTITIES,
)


def _check_unused(workdir: Path) -> None:
    """Refuses to begin a run in a directory with files that it would replace, or resume from."""
    found = [name for name in _WRITTEN_LATER if (workdir / name).exists()]
    if found:
        raise ValueError(
            f"{workdir} holds {', '.join(found)} and no config.json: a new run would overwrite "
            "these files, or continue from checkpoints whose settings are unknown. Give another "
            "--workdir, or restore the config.json of the run"
        )


def check_config(workdir: Path, experiment: Experiment, check_data: Callable[[], None]) -> None:
    """Begins a run, or checks that an old one may be resumed with this config, and extends it.

    Args:
      workdir: directory of the run, held by this process.
      experiment: what the config describes.
      check_data: refuses data that changed.

    Raises:
      ChangedConfigError: the directory holds a run of another config; every difference is named.
      ValueError: files of another program lie there.
    """
    path, config = workdir / "config.json", experiment.config
    if not path.exists():
        _check_unused(workdir)
        check_data()
        files.write_json_atomically(path, versioned(config))
        return
    found = saved_config(files.read_json(path), path)
    refused = refused_changes(found, config)
    if refused:
        longer = ""
        if is_longer(refused):
            longer = (
                "\nTo train this run longer, set train.extend to True beside train.num_epochs "
                "(--config.train.extend=True): from where it stands on, its learning rate is that of "
                "a run of the new length."
            )
        raise _changed(workdir, "run", refused, CHANGEABLE_ON_RESUME, longer)
    check_data()
    changes = changed_keys(found, config)
    if is_longer(changes):
        _extend(workdir, round(found["train"]["num_epochs"] * experiment.steps_per_epoch))
    if changes:
        files.write_json_atomically(path, versioned(config))


def check_finetune_config(
    directory: Path, config: Mapping[str, Any], check_data: Callable[[], None]
) -> None:
    """Begins a fine-tune, or checks that a begun one may be resumed with this config.

    A fine-tune that saved nothing yet may begin again with any settings.

    Args:
      directory: where it keeps its log and its checkpoints.
      config: plain values.
      check_data: refuses data, or an encoder, that changed.

    Raises:
      ChangedConfigError: another fine-tune was begun there; every changed setting is named.
    """
    path = directory / "config.json"
    if path.exists():
        found = saved_finetune(files.read_json(path), path)
        is_begun = bool(saved_steps(directory / "checkpoints"))
        refused = {
            key: values
            for key, values in changed_keys(found, config).items()
            if is_begun and not key.startswith(FINETUNE_CHANGEABLE_ON_RESUME)
        }
        if refused:
            raise _changed(directory, "fine-tune", refused, FINETUNE_CHANGEABLE_ON_RESUME)
    else:
        _check_unused(directory)
    check_data()
    files.write_json_atomically(path, versioned(config))


def _changed(
    directory: Path,
    kind: str,
    refused: Mapping[str, tuple[Any, Any]],
    changeable: Sequence[str],
    hint: str = "",
) -> ChangedConfigError:
    lines = [f"  {key}: the {kind} has {old!r}, got {new!r}" for key, (old, new) in refused.items()]
    return ChangedConfigError(
        f"{directory} holds a {kind} of another config:\n" + "\n".join(lines) + "\n"
        "Give the same settings to resume it, or another --workdir to start anew. Only "
        f"{', '.join(changeable)} may change.{hint}"
    )


_EXTENSIONS = "extensions.json"


def _extend(workdir: Path, num_steps: int) -> None:
    """Records up to which step a run had its old length, and keeps the files of the shorter run.

    Args:
      workdir: directory of the run.
      num_steps: planned steps of the shorter run.
    """
    stands = max(saved_steps(workdir / "checkpoints"), default=0)
    earlier: list[EarlierLength] = []
    start = 0
    for length in (*read_extensions(workdir), EarlierLength(num_steps, stands)):
        until = min(length.until_step, stands)
        if until > start:  # a length without a saved step leaves no trace
            earlier.append(length._replace(until_step=until))
            start = until
    if not earlier:  # killed before its first save: it starts from the beginning
        return
    for name in ("config", "environment"):
        kept = workdir / f"{name}_until_step_{stands}.json"
        if not kept.exists():
            files.write_bytes_atomically(kept, (workdir / f"{name}.json").read_bytes())
    rename_results(workdir, "", f"_step_{stands}")
    if (workdir / "curves.png").exists():
        (workdir / "curves.png").replace(workdir / f"curves_step_{stands}.png")
    files.write_json_atomically(workdir / _EXTENSIONS, [length._asdict() for length in earlier])


def read_extensions(workdir: Path) -> list[EarlierLength]:
    """The planned lengths of a run before it was extended, in their order.

    Args:
      workdir: directory of the run, of `files.to_path`.

    Returns:
      The lengths; none of a run that was never extended.
    """
    path = workdir / _EXTENSIONS
    if not path.exists():
        return []
    return [EarlierLength(**one) for one in files.read_json(path)]
