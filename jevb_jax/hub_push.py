"""Pushes an export to the Hugging Face Hub, with a card: the flag `--push` of `jevb_jax.export`."""

import argparse
from pathlib import Path
from typing import Any

from jevb_jax import hub
from jevb_jax.evaluation import fitted_scores
from jevb_jax.hub import Repository
from jevb_jax.model import Model
from jevb_jax.report import model_card
from jevb_jax.runs import archive, files


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--push` and the flags that go with it."""
    parser.add_argument(
        "--push",
        help="org/name: upload the export with a card to this repository of the Hugging Face Hub",
    )
    parser.add_argument(
        "--private", action="store_true", help="with --push: the repository must be private"
    )
    parser.add_argument(
        "--revision",
        help="with --push: a branch, made if there is none; the main branch by default",
    )
    parser.add_argument(
        "--license",
        help="with --push: license of the weights for the card, such as apache-2.0; unknown by default",
    )


def target(arguments: argparse.Namespace) -> Repository | None:
    """The repository that the flags name, or None without `--push`.

    Raises:
      ValueError: this is no name of a repository, or a flag is given without `--push`.
      ModuleNotFoundError: the extra `hub` is not installed.
    """
    if arguments.push is None:
        for flag in ("private", "revision", "license"):
            if getattr(arguments, flag):
                raise ValueError(f"--{flag} goes with --push=organization/name, which is not given")
        return None
    found = hub.parse(f"hf://{arguments.push.removeprefix('hf://')}")
    if found is None or found.revision:
        raise ValueError(
            f"--push takes organization/name, got {arguments.push!r}. A branch goes into --revision"
        )
    hub.library()  # what is missing is known before the export
    return found._replace(revision=arguments.revision)


def push(
    directory: str, repository: Repository, model: Model, arguments: argparse.Namespace
) -> str:
    """Uploads an export in one commit, with a card that has the numbers of its run.

    Args:
      directory: local directory of the export.
      repository: from `target`.
      model: the exported model.
      arguments: with the attributes `workdir`, from which the model was loaded, `private` and
        `license`.

    Returns:
      What to tell the user.

    Raises:
      HubError, ValueError, ArchiveError: as for `hub.upload`.
    """
    path = files.to_path(directory)
    if files.is_remote(path):
        raise ValueError(f"only a local directory can be pushed, got --out={directory}")
    card = model_card.card_text(
        repository.name,
        model.settings,
        step=model.step,
        recorded_data=model.recorded_data,
        has_fitted_score=not fitted_scores.why_no_default(
            model.settings, archive.read_manifest(path).get(fitted_scores.ENTRY)
        ),
        results=_results(arguments.workdir, model.step),
        license_id=arguments.license or model_card.UNKNOWN_LICENSE,
    )
    commit = hub.upload(path, repository, card=card, private=arguments.private)
    return f'Pushed. jevb_jax.load("{repository}") loads it; this commit is {commit}'


def _results(workdir: str, step: int) -> dict[str, Any] | None:
    """The results of a checkpoint; None if it was not evaluated, or if there is no run."""
    if hub.parse(workdir) is not None:
        return None
    for name in ("results.json", f"results_step_{step}.json"):
        path: Path = files.to_path(workdir) / name
        if path.exists():
            found = files.read_json(path)
            if found["step"] == step:
                return found
    return None
