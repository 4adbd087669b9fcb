"""The programs that train, evaluate and fine-tune, with their flags.

A flag is defined when its program starts. So importing this module defines none of them. What does
the work takes seconds to import. It is imported after the command line was read, so that a mistake
in it is told at once.
"""

from typing import Any

from absl import flags
from ml_collections import config_flags

from jevb_jax import extras
from jevb_jax.command_line.start import start


def train() -> None:
    """Trains or resumes a run: `--config=digits --workdir=runs/digits`.

    --config takes a Python file, the config.json of a run, or the name of a config of the package.
    """
    config = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
    workdir = flags.DEFINE_string(
        "workdir", None, "Directory of the run; a run in it is resumed.", required=True
    )
    flags.mark_flag_as_required("config")

    def work() -> None:
        with extras.explained():
            from jevb_jax import commands
        commands.train(config.value, workdir.value)

    start(train, work)


def evaluate() -> None:
    """Evaluates a run's checkpoint: `--workdir=runs/digits`.

    `--data=transfer:digits` evaluates the run's encoder on other labeled data.
    """
    workdir = flags.DEFINE_string("workdir", None, "Directory of a trained run.", required=True)
    step = flags.DEFINE_integer(
        "step", None, "Step of the checkpoint; the latest by default.", lower_bound=0
    )
    ood = config_flags.DEFINE_config_file(
        "ood",
        None,
        "Protocol of out-of-distribution detection, instead of the run's own. The run's default score "
        "stays, unless the protocol names another.",
        lock_config=True,
    )
    data = config_flags.DEFINE_config_file(
        "data",
        None,
        "Other labeled data, for k-NN and linear probes only (configs/transfer.py).",
        lock_config=True,
    )
    accept = flags.DEFINE_bool(
        "accept_changed_data",
        False,
        "Evaluate even if the data have changed since the run started; the results say so.",
    )

    def work() -> None:
        with extras.explained():
            from jevb_jax import commands
            from jevb_jax.settings import run_config
        config: Any = run_config.load_config(workdir.value)
        if data.value is not None:
            if ood.value is not None:
                raise ValueError("give --data or --ood, not both: --data evaluates no detection")
            commands.evaluate_on(config, data.value, workdir.value, step=step.value)
            return
        if ood.value is not None:
            own_score = config.ood.default_score
            config.ood = ood.value
            # A protocol that names no default score leaves that of the run.
            config.ood.default_score = ood.value.default_score or own_score
        config.input.accept_changed_data = accept.value
        commands.evaluate(config, workdir.value, step=step.value)

    start(evaluate, work)


def finetune() -> None:
    """Fine-tunes a trained encoder: `--config=finetune_digits:full --workdir=runs/digits_full`."""
    config = config_flags.DEFINE_config_file(
        "config", None, "Config of the fine-tune.", lock_config=True
    )
    workdir = flags.DEFINE_string("workdir", None, "Directory to write to.", required=True)
    flags.mark_flag_as_required("config")

    def work() -> None:
        with extras.explained():
            from jevb_jax import finetuning
            from jevb_jax.training import experiment
        finetuning.finetune(experiment.to_json_values(config.value), workdir.value)

    start(finetune, work)
