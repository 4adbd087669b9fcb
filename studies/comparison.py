"""Our numbers beside the published ones: writes `docs/comparison.md`.

python -m studies.comparison --out=docs/comparison.md

Our numbers are read from the tables in `docs/results`; each names the command that made it. A published
number was read in the file or page that is named. Two numbers of a table were rarely made alike, so
each has its protocol, and a difference of protocols is no difference of methods.
"""

import argparse
import dataclasses
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from jevb_jax.report import tables
from jevb_jax.runs import files
from studies import anchors
from studies.published_numbers import Ours, Published

_HOURS = "takes hours on a CPU"
_DATA = "needs a download"
_ONE_CLASS = f"jevb-study studies/one_class_digits.py --out=runs/one_class_digits  # {_HOURS}"
_ADJACENT = f"jevb-study studies/adjacent_digits.py --out=runs/adjacent_digits  # {_HOURS}"
_ADJACENT_COLOR = (
    "jevb-study studies/adjacent_cifar10_small.py --out=runs/adjacent_cifar10_small"
    f"  # {_DATA}; {_HOURS}"
)
_UNCERTAINTY = (
    f"jevb-study studies/cifar10_uncertainty.py --out=runs/cifar10_uncertainty  # {_DATA}; {_HOURS}"
)
_RUNS = "runs/cifar10_uncertainty/runs/direction/seed_*"
_URL_COMMAND = f"{_UNCERTAINTY}\npython -m studies.detection_table {_RUNS} --out=runs/url"
_TEST = f"jevb-study studies/cifar10_small_test.py --out=runs/test  # {_DATA}; {_HOURS}"
_FULL = (
    "python train.py --config=configs/cifar10.py --workdir=runs/cifar10"
    "  # see full_size.md; needs a GPU"
)
_THROUGHPUT = (
    "python -m benchmarks.train_throughput --out=runs/speed"
    "  # all flags: benchmarks/README.md; needs a GPU"
)
_FULL_RUN = "jevb-study studies/full_size.py --runs=jevb --out=runs/full_size  # needs a GPU"
_FULL_SIMSIAM = "jevb-study studies/full_size.py --runs=simsiam --out=runs/full_size  # needs a GPU"
_SMALL_IMAGES = "16 pixels, 20,000 images, ResNet-8, 8 epochs, two CPU cores"


@dataclasses.dataclass(frozen=True)
class Question:
    """One table of the page.

    Attributes:
      title: heading.
      answer: what the table says, in a sentence or two.
      published: of others.
      ours: of this library.
    """

    title: str
    answer: str
    published: Sequence[Published]
    ours: Sequence[Ours]


def _detection(group: str) -> list[Ours]:
    """The rows of the uncertainty study for near or far sets."""
    protocol = f"AUROC, {_SMALL_IMAGES}; mean over the {group} sets of ood.md"
    names = {
        "JEVB, mixture and residual (default score)": ("direction", "own"),
        "JEVB, embedding, Mahalanobis": ("direction", "embedding"),
        "SimSiam, embedding, Mahalanobis": ("simsiam", "embedding"),
        "VI-SimSiam, embedding, Mahalanobis": ("vi_simsiam", "embedding"),
    }
    likelihood = "jevb/negative_log_likelihood"
    return [
        Ours(what, "uncertainty/table.csv", run, f"{score}, {group}", protocol, _UNCERTAINTY)
        for what, (run, score) in names.items()
    ] + [
        Ours(
            "JEVB, likelihood of one image",
            "url/table.csv",
            "direction",
            f"{likelihood}, {group} mean",
            protocol,
            _URL_COMMAND,
        )
    ]


def _at_full_size(what: str) -> list[Ours]:
    """The rows of the full-size encoder for a group of outside sets, or a measure of uncertainty."""
    is_group = what in ("near", "far")
    protocol = f"AUROC; mean over the {what} sets of ood.md" if is_group else "CIFAR-10"
    names = {} if what == "people's entropy" else {"likelihood": "likelihood of one image"}
    names |= {"SSD": "representation, SSD"} if is_group else {}
    names |= {"norm": "representation, norm"}
    return [
        Ours(
            f"JEVB at full size, {label}{'' if is_group else f', {what}'}",
            "full_size/third_runs.csv",
            _FULL_TEST,
            f"{name}, {what}",
            f"{protocol}; {_FULL_PROTOCOL}",
            _FULL_EVALUATION,
        )
        for name, label in names.items()
    ]


_FULL_TEST = "jevb, test"
_FULL_PROTOCOL = "ResNet-18, 100 epochs, Muon and a target network; test; one view, one seed"
_FULL_EVALUATION = "python evaluate.py --workdir=runs/full_size/runs/jevb/seed_0  # needs a GPU"
_SSD = "README of inspire-group/SSD, commit cf2e162"
_CSI = "README of alinlab/CSI, commit 60742b6"
_URL = "results and plot scripts of mkirchhof/url, commit eacd47f"
QUESTIONS = (
    Question(
        "How good is the representation? (CIFAR-10)",
        "Nearly as good as SimCLR's after as many epochs: 0.819 by k-NN and 0.854 linear against 0.832 "
        "and 0.856, with 45,000 training images instead of 50,000 (one seed). Nothing of ours has run "
        "longer. SimSiam in our code is far behind with its published recipe in 100 epochs. An earlier "
        "run of JEVB, without Muon and a target network, reached 0.473.",
        (
            Published(
                "SimCLR, 100 epochs",
                "0.832 ± 0.002 k-NN, 0.856 ± 0.002 linear",
                "ResNet-18; k-NN with 10 neighbors, cosine, equal votes; three seeds",
                "README of dkobak/simclr-cifar10",
            ),
            Published(
                "SimCLR, 500 epochs",
                "0.903 ± 0.003 k-NN",
                "the same; 99 minutes on one A100",
                "the same",
            ),
            Published(
                "FastSiam, 200 epochs",
                "0.906 k-NN",
                "ResNet-18, batch 128; k = 200, best epoch on test",
                "benchmarks of lightly, commit e8d317f",
            ),
            Published(
                "SimSiam, 800 epochs",
                "0.904 k-NN; 0.919 linear",
                "ResNet-18; k = 200; linear: another repository",
                "lightly; Reza-Safdari/SimSiam-91.9",
            ),
            Published(
                "EMP-SSL, 20 crops, 10 epochs",
                "0.907 linear",
                "ResNet-18; features averaged over 128 crops",
                "README of tsb0601/EMP-SSL, commit 8fc3758",
            ),
        ),
        (
            Ours(
                "JEVB, 100 epochs",
                "full_size/third_runs.csv",
                _FULL_TEST,
                "10-NN accuracy",
                f"{_FULL_PROTOCOL}; k = 10, equal votes",
                _FULL_EVALUATION,
            ),
            Ours(
                "the same, linear",
                "full_size/third_runs.csv",
                _FULL_TEST,
                "linear accuracy",
                _FULL_PROTOCOL,
                _FULL_EVALUATION,
            ),
            Ours(
                "the same, validation",
                "full_size/third_runs.csv",
                "jevb",
                "10-NN accuracy, validation",
                "k = 10, equal votes; 5,000 validation images",
                _FULL_RUN,
            ),
            Ours(
                "SimSiam, 100 epochs",
                "full_size/second_runs.csv",
                "simsiam",
                "10-NN accuracy, validation",
                "ResNet-18; k = 10, equal votes; 5,000 validation images; one seed",
                _FULL_SIMSIAM,
            ),
            Ours(
                "JEVB, 100 epochs, the first run",
                "full_size/first_runs.csv",
                "jevb",
                "20-NN accuracy",
                "ResNet-18; k = 20, T = 0.1; test; one seed; the settings of that time",
                _FULL,
            ),
            Ours(
                "JEVB, 100 epochs, the first run, linear",
                "full_size/first_runs.csv",
                "jevb",
                "linear accuracy",
                "the same run",
                _FULL,
            ),
            *(
                Ours(
                    f"{name}, small study, linear",
                    "test/table.csv",
                    run,
                    "linear accuracy",
                    "16 pixels, 10,000 images, ResNet-8, 8 epochs, two CPU cores; test",
                    _TEST,
                )
                for name, run in (("JEVB", "jevb"), ("SimSiam", "simsiam"), ("BYOL", "byol"))
            ),
        ),
    ),
    Question(
        "Does it notice other classes? (CIFAR-10 against near sets)",
        "The small encoders hardly, with any score. At full size the norm does best, then SSD, then the "
        "likelihood of one image. All are behind published encoders that were trained for longer.",
        (
            Published("SSD", "0.906", "AUROC, CIFAR-100; ResNet-50, SimCLR, 500 epochs", _SSD),
            Published(
                "CSI", "0.893", "AUROC, CIFAR-100; ResNet-18, four rotations, ten views", _CSI
            ),
        ),
        [*_detection("near"), *_at_full_size("near")],
    ),
    Question(
        "Does it notice other data sets? (CIFAR-10 against far sets)",
        "In small encoders, Mahalanobis distances and the default score do, and the likelihood of one "
        "image does the reverse. At full size SSD and the likelihood do.",
        (Published("SSD", "0.996 / 0.976", "AUROC, SVHN / textures; as above", _SSD),),
        [*_detection("far"), *_at_full_size("far")],
    ),
    Question(
        "Does it notice strange images of one class?",
        "On digits. CIFAR-10 has not been run at a size that could be compared.",
        (
            Published("CSI", "0.943", "AUROC, CIFAR-10, mean of ten classes; ResNet-18", _CSI),
            Published("SimCLR features", "0.879", "the same", _CSI),
        ),
        [
            Ours(
                f"JEVB, {name}",
                "one_class/table.csv",
                "mean",
                name,
                "AUROC, 8x8 digits of scikit-learn, mean of ten classes; one seed",
                _ONE_CLASS,
            )
            for name in ("scale", "embedding SSD", "representation Mahalanobis")
        ],
    ),
    Question(
        "Does it notice other classes of the same data set? (adjacent detection)",
        "On digits, yes: JEVB's likelihood and SSD are level with a classifier's softmax, which needs "
        "labels. On small color images, no: after a short training, nothing does, not even the softmax "
        "with labels (the classifier is right on 44% of the test images). The draw of the classes "
        "matters more than method and score. The published protocol uses other data and found that "
        "detectors without labels can fail on it, so its numbers do not compare.",
        (),
        [
            Ours(
                f"JEVB, {name}",
                "adjacent/table.csv",
                "mean",
                name,
                "AUROC, 8x8 digits of scikit-learn, eight classes inside; mean of five draws of classes",
                _ADJACENT,
            )
            for name in (
                "likelihood",
                "default score",
                "representation SSD",
                "embedding Mahalanobis",
                "max softmax, with labels",
            )
        ]
        + [
            Ours(
                f"{label}, color, {name}",
                "adjacent_cifar10/table.csv",
                run,
                name,
                "AUROC, CIFAR-10, 16 pixels, 10,000 images, ResNet-8, 8 epochs, eight classes inside; "
                "mean of three draws of classes",
                _ADJACENT_COLOR,
            )
            for label, run, names in (
                (
                    "JEVB",
                    "jevb",
                    (
                        "likelihood",
                        "default score",
                        "representation Mahalanobis",
                        "max softmax, with labels",
                    ),
                ),
                ("SimSiam", "simsiam", ("representation Mahalanobis", "max softmax, with labels")),
            )
            for name in names
        ],
    ),
    Question(
        "Does uncertainty predict errors, crops and people?",
        "The likelihood of one image says a little about errors, the default score nothing, and neither "
        "agrees with people. In small encoders both notice crops about as a plain encoder's norm does; "
        "at full size the likelihood notices 92% of them, and plain SSD nearly all. The norm of the "
        "full-size representation notices errors as well as uncertainty that was trained with labels "
        "does in another network, and agrees a little with people (over CIFAR-10H alone; the published "
        "number is a mean over several data sets). R-AUROC and the crop check follow the benchmark's "
        "code.",
        (
            Published(
                "loss prediction, R-AUROC",
                "0.739 / 0.706",
                "CIFAR-10 / CIFAR-100; frozen ViT, trained with labels",
                _URL,
            ),
            Published("plain InfoNCE, norm, R-AUROC", "at most 0.529", "ResNet-50", _URL),
            Published(
                "cropped images are less certain",
                "0.87 to 0.95",
                "loss prediction; share of images",
                _URL,
            ),
            Published("the same", "about 0.53 to 0.61", "plain InfoNCE, norm", _URL),
            Published(
                "people's entropy, rank correlation",
                "0.095",
                "best of 324 runs, mean of soft sets",
                _URL,
            ),
        ),
        [
            Ours(
                f"JEVB, {name}, {what}",
                "url/table.csv",
                "direction",
                f"{score}, {column}",
                f"CIFAR-10; {_SMALL_IMAGES}",
                _URL_COMMAND,
            )
            for what, column in (
                ("R-AUROC", "r_auroc"),
                ("cropped images are less certain", "cropped_has_bigger_uncertainty"),
                ("people's entropy", "human_disagreement_correlation"),
            )
            for name, score in (
                ("likelihood of one image", "jevb/negative_log_likelihood"),
                ("default score", "jevb/mixture_and_residual"),
            )
        ]
        + [
            row
            for what in ("R-AUROC", "cropped images are less certain", "people's entropy")
            for row in _at_full_size(what)
        ],
    ),
    Question(
        "How fast is it?",
        "Faster than the two other libraries, by 1.6 to 4.7 times, when all run on one GPU in one "
        "measurement. A published number was made on an older GPU.",
        (
            Published(
                "SimCLR, A100",
                "8,400 views per second",
                "derived from 11.9 s an epoch; ResNet-18, 32 pixels, 16 workers",
                "README of dkobak/simclr-cifar10",
            ),
            Published("SimCLR, A100, to 90% k-NN", "99 minutes", "500 epochs", "the same"),
        ),
        [
            Ours(
                what,
                "speed/table.csv",
                run,
                "views per second",
                "views per second in training; one H200, bfloat16, ResNet-18, batch 1024; in turns in "
                "one run",
                _THROUGHPUT,
                is_of_others=what == run,
            )
            for what, run in (
                ("JEVB", "jevb"),
                ("SimSiam", "simsiam"),
                *(
                    (run, run)
                    for run in (
                        "lightly's SimSiam, torchvision in workers",
                        "lightly's SimSiam, kornia on the device, torch.compile",
                        "stable-pretraining, JAX",
                    )
                ),
            )
        ],
    ),
)


def _table(question: Question) -> list[str]:
    """The table of a question, and the commands of our rows."""
    rows = [(one.what, one.value, one.protocol, one.source) for one in question.published]
    for one in question.ours:
        whose = "measured by us" if one.is_of_others else "ours"
        rows.append((f"**{whose}:** {one.what}", one.value, one.protocol, f"[table]({one.page})"))
    lines = tables.markdown_table(("method", "number", "protocol", "source"), rows)
    # Each command once, in their order; some are two lines.
    commands = dict.fromkeys(line for one in question.ours for line in one.command.splitlines())
    return ["\n".join(lines), *(f"    {command}" for command in commands)]


def page(questions: Sequence[Question] = QUESTIONS) -> str:
    """The page as Markdown."""
    command = "python -m studies.comparison --out=docs/comparison.md"
    text = (
        "Our numbers are read from our tables, and the command that made them stands below. A "
        "published number was read where it says. Two numbers were rarely made alike: the column "
        "*protocol* says how, and a difference of protocols is no difference of methods. This "
        "page is generated:"
    )
    parts = ["# Beside published numbers", textwrap.fill(text, 100), f"    {command}"]
    for question in questions:
        parts += [f"## {question.title}", textwrap.fill(question.answer, 100), *_table(question)]
    parts += anchors.anchor_lines() + anchors.difference_lines() + anchors.null_test_lines()
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser("python -m studies.comparison", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="Markdown file")
    files.write_text_atomically(parser.parse_args(arguments).out, page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
