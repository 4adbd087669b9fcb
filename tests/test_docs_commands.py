"""Every command and every passage of Python of the pages is run here or by another test, or has a mark.

`tests/doc_commands.py` finds them. What a page does not mark (`# needs a GPU` and so on) needs a row of
`ROWS`. A row adds what makes a command small, or names the test that runs it. Nothing else is left out.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from typing import NamedTuple

import pytest

from tests.doc_commands import MARKS, PAGES, ROOT, Passage, passages, passages_of

DETECTION = (
    "ssd_clusters=(1,)",
    "num_views=2",
    "num_samples=2",
    "num_bootstrap=2",
    "severities=(5,)",
)
TRAINING = (
    *("model.width=4", "model.projector_hidden_dims=(16,)", "model.embedding_dim=8"),
    *("model.head_hidden_dim=8", "augmentation.jitter_probability=0.0"),
    *("data.num_train_examples=300", "train.num_epochs=1", "optimizer.warmup_epochs=0.0"),
    *("train.health_every_steps=0", "evaluation.compare_untrained=False"),
    *("evaluation.l2_grid=(0.001,)", "evaluation.labels_per_class=0"),
    *("ood.corruptions=()", *(f"ood.{one}" for one in DETECTION)),
)
SMALL_RUN = tuple(f"--config.{one}" for one in TRAINING)
OF_VECTORS = (
    "model.proj",
    "model.emb",
    "model.head",
    "train.num",
    "optim",
    "eval",
    "ood.num",
    "ood.ssd",
)
SMALL_FEATURES = tuple(f"--config.{one}" for one in TRAINING if one.startswith(OF_VECTORS))
SMALL_FEATURES += ("--config.train.batch_size=128",)
SMALL_TUNE = ("--config.train.num_epochs=1", "--config.optimizer.warmup_epochs=0.0")
SMALL_OOD = tuple(f"--ood.{one}" for one in (*DETECTION, "corruptions=('contrast',)"))
TINY = ("--backbone=convnet", "--width=2", "--image_size=8", "--num_rounds=1")
SMALL_OBJECTIVE = (
    *("--dims=4", "--batches=4", "--num_samples=1", "--num_rounds=1"),
    *("--encoder_batch=2", "--encoder_width=1"),
)
SMALL_MEMORY = (*TINY, "--batch", "256", "512", "--D=512", "--samples=1", "--small_crops=0")
SMALL_SCORES = (
    *(*TINY, "--width=8", "--num_images=300", "--num_fit_images=300", "--batch_size=300"),
)

DIGITS = """
import jevb_jax, sklearn.datasets
images = (sklearn.datasets.load_digits().images[:40, ..., None] * 15).astype("uint8")
"""
PHOTOS = """
import sklearn.datasets
images = sklearn.datasets.load_sample_images().images
"""
OF_PHOTOS = "assert embeddings.shape == (2, 512) and scores.shape == (2,)"
DETECTOR_SERVED = """
assert export.main(
    ["--workdir=runs/digits", "--out=exports/digits", "--false_alarm_rate=0.05"]) == 0
"""
OF_SERVED = 'assert outputs["score"].shape == outputs["is_outside"].shape == (40,)'
OWN_ENCODER = """
import jax, jevb_jax
def encode(params, view): return view, params["w"] * view, 0.5 + 0 * view
"""
OF_OWN_ENCODER = """
h = jax.random.normal(jax.random.key(0), (2, 8, 4))
loss = jax.jit(loss_fn)({"w": 0.1, "radial_scale": 0.5}, jax.random.key(1), *h)
assert loss.shape == ()
"""
FEATURE_FILES = """
import numpy
for name, count in (("train", 300), ("test", 60)):
    rows = numpy.random.default_rng(count).normal(size=(count, 12)).astype("float32")
    numpy.savez(f"{name}.npz", features=rows, labels=numpy.arange(count) % 3)
"""
FEATURES = """
import jevb_jax, numpy
features = numpy.load("test.npz")["features"]
"""
OF_FEATURES = """
assert model.embed(features).shape == model.posterior(features).scale.shape == (60, 8)
assert model.ood_score(features).shape == (60,)
"""
OWN_ONNX = """
import shutil
shutil.copy("exports/digits/model.onnx", "encoder.onnx")
""" + DIGITS.replace("images =", "train_images =")  # fmt: skip
ROUNDED = """
import jevb_jax, numpy, sklearn.datasets
from jevb_jax.evaluation import fitted_scores
model, loaded = (jevb_jax.load(f"{one}/digits_8_bits") for one in ("runs", "exports"))
sha256 = loaded.fitted_scores.weights_sha256
assert sha256 == fitted_scores.weights_sha256(loaded.variables)
images = sklearn.datasets.load_digits().images[:20, ..., None] / 16
numpy.testing.assert_array_equal(loaded.ood_score(images), model.ood_score(images))
"""
SIMSIAM = """
from configs import cifar10, default
def small(get_config, *given):
    config = get_config(*given)
    config.method, config.model.backbone = "simsiam", "convnet"
    config.augmentation.jitter_probability = config.augmentation.grayscale_probability = 0.0
    return config
"""  # it compiles in a fraction of the time
COPIED_STUDY = """
from jevb_study import run
# Each of its runs is a copy of a finished one; `tests/jevb_study/test_run.py` trains a study.
COPY = 'cp "$0/asked_config.json" "$0/config.json" && cp runs/digits/results.json "$0"'
run._command = lambda directory: ["sh", "-c", COPY, str(directory)]
"""
FEW_SCORES = (
    SIMSIAM
    + """
default.get_config = lambda get_config=default.get_config: small(get_config)
from benchmarks import ood_scores
table = ood_scores.score_table.score_table
ood_scores.score_table.score_table = lambda *given, **more: dict(
    list(table(*given, **more).items())[-2:])
"""
)
SHORT_STARTUP = """
from benchmarks import startup
startup.IMPORTS = startup.IMPORTS[:1]
startup.first_step_seconds = lambda train, cache: 1.0  # four trainings, each a process
"""
COPIED_SOAK = """
import pathlib, subprocess
from benchmarks import soak
# Both runs are copies of a finished one: the soak compares them, and kills nobody.
pathlib.Path("runs/soak").parent.mkdir(exist_ok=True)
soak.start = lambda workdir, settings: subprocess.Popen(["cp", "-r", "runs/digits", workdir])
"""
SMALL_STEPS = SIMSIAM + """
default.get_config = lambda get_config=default.get_config: small(get_config)
from benchmarks import memory
made, compiled_step = {}, memory.compiled_step
def once(arguments, settings):
    key = tuple(settings.values())
    if key not in made:
        made[key] = compiled_step(arguments, settings)
    return made[key]
memory.compiled_step = once
"""  # fmt: skip
ONE_BLOCK = """
from benchmarks import objective_cost
resnet = objective_cost.ResNet
objective_cost.ResNet = lambda stages, **more: resnet((1,), **more)
"""
SIMSIAM_VIEWS = SIMSIAM + """
cifar10.get_config = lambda _, get_config=cifar10.get_config: small(get_config, "simsiam")
"""  # fmt: skip

OF_GROWTH = """
found = [round(float(growth[f"backbone/stage{n}_block2/conv2/kernel"]), 1) for n in (1, 2, 3, 4)]
assert found == [2.9, 3.9, 5.4, 7.4], found
"""


class Row(NamedTuple):
    """What happens with the passages that begin with `begins`, a regular expression.

    Attributes:
      where: "runs" or "rest", the two tests below; or who runs it: `.ci/run`, or a test.
      small: arguments that make a command small.
      before: Python to run first; for a passage of Python in the names of its page.
      after: Python to run afterwards, in the same names.
      makes: files that the page promises, of one directory: "DIRECTORY: FILE, FILE".
      page: part of the name of the page, if it matters.
    """

    begins: str
    where: str = "runs"
    small: tuple[str, ...] = ()
    before: str = ""
    after: str = ""
    makes: str = ""
    page: str = ""


EXPORTED = "exports/digits: model.safetensors, model.json, model.stablehlo, fitted.safetensors"
ENCODER = "tests/test_any_encoder.py::test_the_page_runs"
HUB = "tests/test_hub.py::test_the_command_pushes_and_another_process_loads"
METHOD = "tests/test_adding_a_method.py::test_the_page_is_what_it_takes"
PACKAGED = "tests/test_packaging.py::test_the_installed_wheel_trains_without_a_checkout"
PARALLEL = "tests/test_parallel.py::test_two_processes_train_like_one"
SCALING = "tests/test_scaling_model.py::test_command_writes_the_table"
TABLE = (
    "tests/studies/test_detection_table.py::test_cells_are_means_over_seeds_severities_and_groups"
)
TRANSFORMER = "tests/test_any_encoder.py::test_the_transformer_of_the_page_runs"
CONVERT = "tests/test_convert.py::test_the_command_writes_the_backbone_and_what_its_images_need"
TRAINED_ENCODER = "tests/test_any_encoder.py::test_the_training_of_the_page_runs"
DIFFERENCES = "tests/evaluation/test_differences.py::test_the_table_is_written_by_one_process"
ROWS = (
    # Installation.
    Row("pip install -q ", ".ci/run"),
    Row("pytest$", ".ci/run"),
    Row("mkdocs build", ".ci/run"),
    Row(r"pip install (-r requirements\.txt|'\.\[[\w,]+\]')$", PACKAGED),
    Row("jevb-train --config=digits --workdir=runs/digits$", PACKAGED),
    # A run of the digits, and what is done with it.
    Row("import jevb_jax, sklearn", after=OF_PHOTOS),
    Row("import jevb_jax\n", page="full_size", after=OF_GROWTH),
    Row("import jevb_jax\n", page="index", before=PHOTOS, after=OF_PHOTOS),
    Row(
        "python train.py --config=configs/digits.py",
        small=SMALL_RUN,
        makes="runs/digits: report.html, results.json, results.csv, views.png, curves.png, "
        "config.json, environment.json, metrics.jsonl",
    ),
    Row("WANDB_MODE=", small=SMALL_RUN, makes="runs/digits: writers.json"),
    Row("import jevb_jax\n", page="use", before=DIGITS),
    Row("detector = ", page="use", after="assert detector.is_outside(images).shape == (40,)"),
    Row("detector = ", page="results", before=DIGITS + "model = jevb_jax.load('runs/digits')"),
    Row("python -m jevb_jax.export .*--push", HUB),
    Row("model = .*hf://", HUB),
    Row("python -m jevb_jax.export .*digits$", makes=EXPORTED),
    Row(
        "python -m jevb_jax.export .*--onnx",
        makes=EXPORTED + ", detector.stablehlo, model.onnx, detector.onnx",
    ),
    Row("python -m jevb_jax.export .*8_bits", after=ROUNDED),
    Row(
        "from jevb_jax import export",
        before="from jevb_jax import export" + DETECTOR_SERVED,
        after=OF_SERVED,
    ),
    Row("import onnxruntime", page="use", after=OF_SERVED),
    Row("import onnxruntime", page="any_encoder", before=OWN_ONNX),
    Row("python -m jevb_jax.rounding", makes="runs/digits_8_bits: config.json"),
    Row(
        "python evaluate.py --workdir=runs/digits_8_bits", makes="runs/digits_8_bits: results.json"
    ),
    Row("python finetune.py .*full", small=SMALL_TUNE, makes="runs/digits_full: results.json"),
    Row("python finetune.py .*frozen", small=SMALL_TUNE, makes="runs/digits_frozen: results.json"),
    Row("python evaluate.py .*--data=", makes="runs/digits: results_on_digits.json"),
    Row("python evaluate.py .*--ood=", small=SMALL_OOD, makes="runs/digits: results.csv"),
    Row("python -m jevb_jax.convert", CONVERT),
    # Other programs and passages.
    Row("def loss_fn", before=OWN_ENCODER, after=OF_OWN_ENCODER),
    Row("import jax, jevb_jax", after="assert loss.shape == ()"),
    Row("from jevb_jax.configs", after="assert get_config().train.num_epochs == 10"),
    Row(
        "jevb-study --config", before=COPIED_STUDY, makes="runs/df: table.md, table.csv, sweep.png"
    ),
    Row(
        "python -m studies.comparison",
        "tests/studies/test_comparison.py::test_the_page_is_up_to_date",
    ),
    Row("python -m studies.detection_table", TABLE),
    Row("python -m examples.story", "tests/test_story.py::test_tells_the_story"),
    Row("python train.py --config=configs/smoke.py .*--process_id", PARALLEL),
    Row("def distance|METHODS|@dataclass", METHOD),
    Row("from jevb_jax.sklearn_transformer", TRANSFORMER),
    Row("trained = ", TRAINED_ENCODER),
    Row("JEVB_JAX_TESTS=optimized pytest .*--differences", DIFFERENCES),
    Row("import jevb_jax|from sklearn|import numpy|features_fn = jax", ENCODER, page="any_encoder"),
    Row(
        "python train.py .*runs/features",
        "rest",
        SMALL_FEATURES,
        FEATURE_FILES,
        makes="runs/features: report.html",
    ),
    Row("python evaluate.py .*features", "rest", makes="runs/features/fitted: step_2.json"),
    Row("model = .*features", "rest", before=FEATURES, after=OF_FEATURES),
    # Benchmarks.
    Row("python -m benchmarks.scaling_model", SCALING),
    Row("python -m benchmarks.soak", before=COPIED_SOAK, makes="runs/soak: soak.json"),
    Row(
        "python -m benchmarks.input",
        "rest",
        ("--num_images=50", "--num_rounds=1"),
        makes="runs/input: input.json, input.md",
    ),
    Row(
        "python -m benchmarks.ood",
        "rest",
        SMALL_SCORES,
        FEW_SCORES,
        makes="runs/benchmark_ood: ood_scores.json, ood_scores.md",
    ),
    Row(
        "python -m benchmarks.obj",
        "rest",
        SMALL_OBJECTIVE,
        ONE_BLOCK,
        makes="runs/objective_cost: objective_cost.json, objective_cost.md",
    ),
    Row(
        "python -m benchmarks.many",
        "rest",
        ("--views=2", "--batch=4", "--num_steps=1"),
        SIMSIAM_VIEWS,
    ),
    Row(
        "python -m benchmarks.startup",
        "rest",
        ("--num_rounds=1",),
        SHORT_STARTUP,
        makes="runs/startup: startup.json, startup.md",
    ),
    Row(
        "python -m benchmarks.memory",
        "rest",
        SMALL_MEMORY,
        SMALL_STEPS,
        makes="runs/memory: memory.json, memory.md",
    ),
)
UNKNOWN = f"""no test runs this, and the page does not say why. Do one of these:
* add a row to ROWS in tests/test_docs_commands.py, which runs it with what makes it small;
* name there the test that runs it already;
* if it cannot be run in seconds on a CPU, end it in the page with one of these comments: {MARKS}"""
FOUND = [passage for page in PAGES for passage in passages(page)]


def row_of(passage: Passage) -> Row | None:
    """The first row that fits."""
    fits = (row for row in ROWS if row.page in passage.page and re.match(row.begins, passage.text))
    return next(fits, None)


def test_everything_in_the_pages_is_run_or_marked():
    unknown = [str(one) for one in FOUND if not one.mark and row_of(one) is None]
    assert not unknown, "\n".join([*unknown, UNKNOWN])


def test_every_row_has_its_command_and_every_page_its_own():
    used = {id(row_of(one)) for one in FOUND if not one.mark}
    assert [row.begins for row in ROWS if id(row) not in used] == []
    assert len([one for one in FOUND if one.is_shell]) > 80
    assert len([one for one in FOUND if not one.is_shell]) > 20


def test_who_runs_a_command_exists():
    for name in {row.where for row in ROWS} - {"runs", "rest", ".ci/run"}:
        path, _, test = name.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
        for one in FOUND:
            row = row_of(one)
            if one.is_shell and not one.mark and row is not None and row.where == name:
                program = re.sub(r"^python (-m \w+\.)?", "", one.text).split()[0]
                assert program.removesuffix(".py") in (ROOT / path).read_text(encoding="utf-8"), one
    checks = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for one in FOUND:
        row = row_of(one)
        if row is not None and row.where == ".ci/run":
            assert one.text in checks, one


def test_what_pip_is_asked_for_exists():
    """Whether an extra holds what the code needs: `test_packaging.py`."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    asked = [one for one in FOUND if one.is_shell and one.text.startswith("pip install")]
    assert len(asked) > 5
    for one in asked:
        for group in re.findall(r"\.\[([\w,]+)\]", one.text):
            assert set(group.split(",")) <= extras.keys(), one
        for file in re.findall(r"-r (\S+)", one.text):
            assert (ROOT / file).is_file(), one


PAGE = """Text with `python inline.py`.

    A=1 python one.py --x='a b' \\
      --y=2  # its run; needs a GPU
    python two.py '' && jevb-three  # needs a download

    import os
    os.sep  # needs a cluster

    if os.sep:
        os.getcwd()

1. An item:

    text of the item

        docker run x  # needs a gpu

* An item
    that goes on

```
mkdocs build
python -c "import os
os.sep"
```

```math
x = 1
```
    not below an empty line
"""


LINES = "import os\nos.sep  # needs a cluster\n\nif os.sep:\n    os.getcwd()"


def test_code_is_found_in_a_page():
    found = [(one.line, one.text, one.is_shell, one.mark) for one in passages_of("x", PAGE)]
    assert found == [
        (3, "A=1 python one.py '--x=a b' --y=2", True, "needs a GPU"),
        (5, "python two.py ''", True, "needs a download"),
        (5, "jevb-three", True, "needs a download"),
        (7, LINES, False, "needs a cluster"),
        (17, "docker run x", True, ""),
        (23, "mkdocs build", True, ""),
        (24, "python -c 'import os\nos.sep'", True, ""),
    ]  # fmt: skip


def steps_of(where: str) -> list[dict[str, object]]:
    """What one test runs, in the order of the pages. What two pages have alike is run once."""
    steps, seen = [], set()
    for one in FOUND:
        row = row_of(one)
        if one.mark or row is None or row.where != where or (one.text, row) in seen:
            continue
        seen.add((one.text, row))
        text = f"{one.text} {shlex.join(row.small)}" if one.is_shell else one.text
        for code, is_shell in ((row.before, False), (text, one.is_shell), (row.after, False)):
            if code:
                steps.append(
                    {
                        "page": one.page,
                        "name": str(one).partition("\n")[0],
                        "text": code,
                        "is_shell": is_shell,
                    }
                )
    return steps


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("where", ["runs", "rest"])
def test_commands_do_what_the_page_says(where, tmp_path):
    here = tmp_path / "checkout"
    here.mkdir()
    for name in ("configs", "studies", "train.py", "evaluate.py", "finetune.py"):
        (here / name).symlink_to(ROOT / name)
    file = tmp_path / "steps.json"
    file.write_text(json.dumps(steps_of(where)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.run_documented", str(file)],
        cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    for row in ROWS:
        directory, _, files = row.makes.partition(": ")
        for file in files.split(", ") if row.where == where and row.makes else ():
            assert (here / directory / file).is_file(), (row.begins, file)
