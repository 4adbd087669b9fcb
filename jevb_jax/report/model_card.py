"""The card of a model on the Hugging Face Hub: what it is, how to load it, and its numbers.

It is Markdown with the YAML front matter of the Hub. Every number comes with its protocol.
"""

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jevb_jax.report.tables import encoder_columns, markdown_table, measure_rows
from jevb_jax.runs import files
from jevb_jax.settings.sections import DataSection, RunSettings

UNKNOWN_LICENSE = "unknown"  # an identifier of the Hub

# What is known about the license of data, by source and by the name of a set of TFDS.
_LICENSES = {
    "digits": "the digits of scikit-learn, from the UCI repository (CC BY 4.0)",
    "shapes": "shapes that jevb_jax draws itself; nobody has rights in them",
    "cifar10": "CIFAR-10 (Krizhevsky 2009), which has no explicit license and is used for research",
    "cifar100": "CIFAR-100 (Krizhevsky 2009), which has no explicit license and is used for research",
    "fashion_mnist": "Fashion-MNIST (MIT license)",
    "imagenet2012": "ImageNet, whose terms of access allow research and education that is not "
    "commercial",
}
# The directories of an absolute path, up to the first space. The config's own paths are known
# exactly; this is for those of another config, which an evaluation may have read.
_DIRECTORIES = re.compile(r"(?<![\w.:/~])~?/(?:[^\s/,;:()]+/)+")


def card_text(
    repository: str,
    settings: RunSettings,
    *,
    step: int,
    recorded_data: Mapping[str, Any] | None,
    has_fitted_score: bool,
    results: Mapping[str, Any] | None,
    license_id: str = UNKNOWN_LICENSE,
) -> str:
    """The card of an exported model.

    Args:
      repository: name on the Hub, such as "org/name".
      settings: of the run.
      step: training step of the weights.
      recorded_data: the record of the run's data, or None.
      has_fitted_score: the export holds its default score, so that it needs no images to detect.
      results: content of the `results.json` of these weights, or None.
      license_id: the license of the weights, an identifier of the Hub such as "apache-2.0".

    Returns:
      Markdown.
    """
    name = repository.rpartition("/")[2]
    shown = _Shortened(settings)
    is_features = settings.data.source == "features"
    given = "features" if is_features else "images"
    is_jevb = settings.method == "jevb"
    parts = [
        _front_matter(settings, results, license_id),
        f"# {name}",
        f"An encoder that `jevb_jax` trained without labels, with the method `{settings.method}`: "
        f"{_network(settings)}. Step {step:,}.",
        "## Load it",
        "    pip install 'jevb-jax[train,hub]'",
        _lines(repository, given, has_fitted_score=has_fitted_score),
        f"`embed` gives `[N, {settings.model.embedding_dim}]`"
        + (
            f", and `model.posterior({given})` a mean and a standard deviation of each feature"
            * is_jevb
        )
        + (
            f". The score needs no training {given}: larger means less like them."
            if has_fitted_score
            else ". Scores that must be fitted need `fit_images=` and `calibration_images=`."
        ),
        "## Data",
        _data(settings.data, recorded_data, shown),
        "## Settings",
        "\n".join(markdown_table(("setting", "value"), _settings(settings, shown))),
        "`model.json` holds the whole config and the hashes of the files.",
        "## Numbers",
        *_numbers(results, shown),
        "## Limits",
        _limits(settings),
        "## License",
        _license(license_id),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(settings: RunSettings, results: Mapping[str, Any] | None, license_id: str) -> str:
    """The YAML that the Hub reads. JSON is YAML, so a name needs no other quoting."""
    found = results or {}
    metrics = []
    if any(row["name"].endswith("accuracy") for row in found.get("trained", ())):
        metrics.append("accuracy")
    if found.get("ood") and found["ood"]["rows"]:
        metrics.append("roc_auc")
    entries = {
        "license": license_id,
        "library_name": "jevb-jax",
        "tags": [
            "jevb-jax",
            "jax",
            "self-supervised-learning",
            "out-of-distribution-detection",
            settings.method,
            settings.model.backbone,
        ],
        "metrics": metrics,
    }
    if settings.data.source != "features":
        entries["pipeline_tag"] = "image-feature-extraction"
    lines = [f"{key}: {json.dumps(value)}" for key, value in entries.items() if value != []]
    return "\n".join(["---", *lines, "---"])


def _network(settings: RunSettings) -> str:
    if settings.data.source == "features":
        return "a network on features of a frozen encoder"
    size = settings.augmentation.image_size
    return f"`{settings.model.backbone}` for images of {size} pixels"


def _lines(repository: str, given: str, *, has_fitted_score: bool) -> str:
    calls, kind = f"model.embed({given})", "uint8, or floats in [0, 1]"
    if given == "features":
        kind = "float32 [N, F], of the frozen encoder"
    if has_fitted_score:
        calls = f"embeddings, scores = {calls}, model.ood_score({given})"
    else:
        calls = f"embeddings = {calls}"
    return (
        "```python\nimport jevb_jax\n"
        f'model = jevb_jax.load("hf://{repository}")\n'
        f"{calls}   # {kind}\n```"
    )


def _data(data: DataSection, recorded: Mapping[str, Any] | None, shown: "_Shortened") -> str:
    names = [data.tfds_name] if data.source == "tfds" else list(data.train_paths)
    lines = [f"Source: `{data.source}`" + (f", {shown(', '.join(names))}" if names else "") + "."]
    if recorded is not None:
        counted = recorded["fingerprint"]["parts"]
        counts = [f"{counted[part]['images']:,} {part}" for part in counted]
        what = "Rows of features" if data.source == "features" else "Images"
        lines.append(f"{what}: {', '.join(counts)}. They are not in this repository.")
    known = _LICENSES.get(data.source) or _LICENSES.get(data.tfds_name.split(":")[0].split("/")[0])
    lines.append(
        f"License of the data: {known}."
        if known
        else "License of the data: not known to the program that wrote this card."
    )
    return " ".join(lines)


def _settings(settings: RunSettings, shown: "_Shortened") -> list[tuple[str, str]]:
    found: dict[str, Any] = {
        "method": settings.method,
        "seed": settings.seed,
        "model.backbone": settings.model.backbone,
        "model.width": settings.model.width,
        "model.embedding_dim": settings.model.embedding_dim,
        "augmentation.image_size": settings.augmentation.image_size,
        "augmentation.num_views": settings.augmentation.num_views,
        "optimizer.name": settings.optimizer.name,
        "optimizer.learning_rate": settings.optimizer.learning_rate,
        "train.batch_size": settings.train.batch_size,
        "train.num_epochs": settings.train.num_epochs,
        "train.ema_decay": settings.train.ema_decay,
        "train.target_decay": settings.train.target_decay,
    }
    if settings.method == "jevb":
        found |= {
            "jevb.df": settings.jevb.df,
            "jevb.radial_df": settings.jevb.radial_df,
            "jevb.prior_scale": settings.jevb.prior_scale,
        }
    if settings.init.workdir:
        found["init.workdir"] = shown(settings.init.workdir)
    return [(f"`{key}`", f"`{value}`") for key, value in found.items()]


def _numbers(results: Mapping[str, Any] | None, shown: "_Shortened") -> list[str]:
    if results is None:
        return ["These weights were not evaluated, so there are no numbers."]

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    measured = measure_rows(results)
    columns, values_of_rows = encoder_columns(measured)
    rows: list[Sequence[str]] = [
        (row.name, row.features, *map(number, values), shown(row.protocol))
        for row, values in zip(measured, values_of_rows, strict=True)
    ]
    told = f"Of the {results['split']} split, one run."
    if "untrained" in columns:
        told += ' "Untrained" is the same encoder before training.'
    parts = [
        told,
        "\n".join(markdown_table(("measure", "features", *columns, "protocol"), rows)),
    ]
    detection = results.get("ood")
    if detection:
        default = detection["default_score"]
        found = [
            (
                row["outside"],
                *(number(row[key]) for key in ("auroc", "fpr95_outside_positive")),
                shown(detection["sets"][row["outside"]]),
            )
            for row in detection["rows"]
            if row["score"] == default
        ]
        parts += [
            f"Detection of unlike images by the default score, `{default}`. An AUROC of 0.5 is chance. "
            "FPR95 is the share of inside images that are flagged when 95% of the outside images are.",
            "\n".join(markdown_table(("outside set", "AUROC", "FPR95", "protocol"), found)),
        ]
    return parts


def _limits(settings: RunSettings) -> str:
    lines = [
        "* One run with one seed. Another seed gives other numbers.",
        "* Embeddings and scores mean something only for data like the training data, prepared in the "
        "same way.",
        "* A low score does not prove that an image is like the training images. Measure the rate of "
        "errors on your own data before anything depends on it.",
    ]
    if settings.data.source != "features":
        size = settings.augmentation.image_size
        lines.append(
            f"* The network sees {size} x {size} pixels of an image: its shorter side is resized to "
            "that and the center is cut out."
        )
    return "\n".join(lines)


def _license(license_id: str) -> str:
    if license_id == UNKNOWN_LICENSE:
        return "Who pushed this model stated no license of the weights (`--license`)."
    return f"Of the weights: {license_id}. That of the data is above."


class _Shortened:
    """Shortens local paths in a text: the names of directories are nobody's business.

    The paths of the config are known whole, with spaces in them; sources are named by them, or by
    the absolute paths that they become.
    """

    def __init__(self, settings: RunSettings):
        data, ood = settings.data, settings.ood
        given = [*data.train_paths, *data.test_paths, data.data_dir]
        given += [settings.init.workdir, ood.human_counts_path]
        for described in (*ood.outside, *ood.choice):
            given += [*described.get("paths", ()), described.get("data_dir", "")]
        known = set()
        for path in filter(None, given):
            if "://" in path and not path.startswith("file:"):
                continue  # a public address
            known |= {path.rstrip("/"), os.path.normpath(path)}
            with contextlib.suppress(ValueError):  # the home of someone unknown here
                known.add(str(files.to_path(path)))
        self._paths = sorted((path for path in known if "/" in path), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """The text, with only the names of files and of last directories."""
        for path in self._paths:
            name = path.rpartition("/")[2]
            whole = rf"(?<![\w.~-]){re.escape(path)}(?![\w-])"
            text = re.sub(whole, lambda _, name=name: name, text)
        return _DIRECTORIES.sub("", text)
