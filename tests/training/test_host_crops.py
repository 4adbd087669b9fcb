"""Training on crops that the host cuts out of whole pictures."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_sample_image

from configs import smoke
from jevb_jax import parallel
from jevb_jax.images import augmentations, batches, crop_boxes
from jevb_jax.runs.metrics_log import MetricsLog
from jevb_jax.training import pretraining
from jevb_jax.training.experiment import Experiment, build_experiment
from jevb_jax.training.loop import RunLoop


def write_squares(root: Path, size: int) -> None:
    """60 different squares of two real photographs, as PNG."""
    for number in range(60):
        photo = load_sample_image(("china.jpg", "flower.jpg")[number % 2])
        top, left = 5 * number, 7 * number
        Image.fromarray(photo[top : top + size, left : left + size]).save(
            root / f"{number:02d}.png"
        )


def experiment_on(root: Path, crop_from: str, **changes: Any) -> Experiment:
    config: Any = smoke.get_config()
    flat = {
        "data.source": "folder",
        "data.train_paths": (str(root),),
        "data.image_size": 48,
        "data.num_train_examples": 0,
        "data.num_test_examples": 0,
        "augmentation.crop_from": crop_from,
        "augmentation.image_size": 24,
        "augmentation.num_small_crops": 0,
        "optimizer.warmup_epochs": 0.0,
        "train.batch_size": 16,
        "train.num_micro_batches": 2,
        "train.health_every_steps": 0,
        "train.steps_per_dispatch": 3,
        "method": "simsiam",
        "checkpoint.every_steps": 0,
        **changes,
    }
    config.update_from_flattened_dict(flat)
    return build_experiment(config)


def trained(experiment: Experiment, num_steps: int, directory: Path) -> tuple[Any, list[Any]]:
    """The state after some steps of a run, and the log."""
    plan = pretraining.make_plan(experiment, validate=lambda _: {}, best_measure="")
    plan = dataclasses.replace(plan, num_steps=num_steps, measurements=[])
    console, mesh = Console(file=io.StringIO()), parallel.make_mesh(jax.devices()[:1])
    loop = RunLoop(plan, directory, console, mesh, parallel.StopRequest(), lambda: None)
    try:
        state = loop.train(loop.restore())
    finally:
        loop.checkpointer.close()
        loop.log.close()
    return state, MetricsLog.read(directory / "metrics.jsonl")


@pytest.mark.slow
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    """With micro-batches, and dispatches of several steps of which the last is not full."""
    for name in ("images", "whole", "cut"):
        (tmp_path / name).mkdir()
    write_squares(tmp_path / "images", 48)
    Image.open(tmp_path / "images" / "00.png").resize((90, 50)).save(
        tmp_path / "images" / "wide.png"
    )
    experiment = experiment_on(tmp_path / "images", "image")
    whole, log = trained(experiment, 5, tmp_path / "whole")
    trained(experiment, 2, tmp_path / "cut")
    again, log_of_parts = trained(experiment, 5, tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    assert [one["train/loss"] for one in log] == [one["train/loss"] for one in log_of_parts]


class FoundError(Exception):
    """Carries the arguments of a call out of a step."""


def test_a_step_gives_the_views_the_keys_that_the_boxes_are_drawn_by(tmp_path, monkeypatch):
    def found(keys: Any, images: Any, _: Any) -> Any:
        raise FoundError(keys, images)

    write_squares(tmp_path, 48)
    experiment = experiment_on(tmp_path, "image", **{"train.num_micro_batches": 1})
    crops = experiment.host_crops
    assert crops is not None
    images: Any = batches.gather_crops(
        experiment.dataset.train, np.arange(16), crops.of_examples(7, np.arange(16))
    )
    monkeypatch.setattr(augmentations, "multi_view", found)
    state = experiment.initial_state()._replace(step=jax.numpy.int32(7))
    with pytest.raises(FoundError) as caught:
        experiment.train_step(state, images, experiment.key)
    keys, seen = caught.value.args
    assert seen is images
    first = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 0), 5)[0])(keys)
    boxes = [crop_boxes.sample_crop(jax.random.split(k)[0], height=90, width=70) for k in first]
    drawn = [one.boxes(height=90, width=70)[0] for one in crops.of_examples(7, np.arange(16))]
    np.testing.assert_array_equal(drawn, boxes)
