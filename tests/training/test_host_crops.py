"""Training on crops that the host cuts out of whole pictures."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_sample_image

from configs import smoke
from jevb_jax import parallel
from jevb_jax.images import augmentations, batch_order, batches, crop_boxes
from jevb_jax.images.crop_boxes import HostCrops, key_words
from jevb_jax.images.image_files import FolderSource
from jevb_jax.runs.metrics_log import MetricsLog
from jevb_jax.settings.sections import InputSection
from jevb_jax.training import pretraining
from jevb_jax.training.experiment import Experiment, build_experiment
from jevb_jax.training.loop import RunLoop
from jevb_jax.training.plan import Plan
from jevb_jax.training.step import TrainState


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


def initial_state() -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), {"sums": jnp.zeros(3)}, {}, (), None, None)


def step(state: TrainState, crops: Any, key: Any) -> tuple[TrainState, dict[str, Any]]:
    """Logs the levels that it sees, and adds up those of each view."""
    del key
    sums = jnp.stack([view.astype(jnp.float32).mean() for view in crops])
    params = {"sums": 0.9 * state.params["sums"] + sums}
    metrics = {"loss": sums[0], "gradient_norm": sums[1], "small": sums[2]}
    return state._replace(step=state.step + 1, params=params), metrics


def trained(made: Plan, num_steps: int, directory: Path) -> tuple[Any, list[Any]]:
    """The sums after some steps of a run, and its log."""
    made = dataclasses.replace(made, num_steps=num_steps)
    console, mesh = Console(file=io.StringIO()), parallel.make_mesh()
    loop = RunLoop(made, directory, console, mesh, parallel.StopRequest(), lambda: None)
    try:
        state = loop.train(loop.restore())
    finally:
        loop.checkpointer.close()
        loop.log.close()
    return np.asarray(state.params["sums"]), MetricsLog.read(directory / "metrics.jsonl")


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    """On pictures of several sizes, in dispatches of several steps of which the last is not full."""
    for name in ("images", "whole", "cut"):
        (tmp_path / name).mkdir()
    write_squares(tmp_path / "images", 48)
    first = tmp_path / "images" / "00.png"
    Image.open(first).resize((90, 50)).save(tmp_path / "images" / "wide.png")
    source = FolderSource(tmp_path / "images", image_size=48)
    scales = ((0.2, 1.0), (0.2, 1.0), (0.05, 0.2))
    key = key_words(jax.random.key(3))
    crops = HostCrops(key, (24, 24, 8), scales, (3 / 4, 4 / 3), "bilinear")
    placement: Any = "auto"  # they would fit the device
    made = Plan(
        config={"a": 1},
        seed=3,
        source=source,
        labels=None,
        input=InputSection(placement, 10**9, 0, 2, False),
        batch_size=16,
        num_steps=0,
        schedule=optax.constant_schedule(0.1),
        initial_state=initial_state,
        train_step=step,
        log_every_steps=1,
        save_every_steps=0,
        keep_latest=2,
        steps_per_dispatch=3,
        crops=crops,
    )
    whole, log = trained(made, 5, tmp_path / "whole")
    trained(made, 2, tmp_path / "cut")
    again, log_of_parts = trained(made, 5, tmp_path / "cut")
    np.testing.assert_array_equal(again, whole)
    for number, (one, other) in enumerate(zip(log, log_of_parts, strict=True)):
        rows = batch_order.batch_indices(number, num_examples=61, batch_size=16, seed=3)
        seen = batches.gather_crops(source, rows, crops.of_examples(number, np.arange(16)))
        for name, view in zip(("loss", "gradient_norm", "small"), seen, strict=True):
            assert one[f"train/{name}"] == other[f"train/{name}"]
            np.testing.assert_allclose(one[f"train/{name}"], view.mean(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"streamed, but input.placement is resident"):
        dataclasses.replace(made, input=dataclasses.replace(made.input, placement="resident"))


@pytest.mark.slow
def test_a_step_takes_parts_of_the_crops(tmp_path):
    write_squares(tmp_path, 48)
    experiment = experiment_on(tmp_path, "image")
    views = [jax.ShapeDtypeStruct((16, size, size, 3), jnp.uint8) for size in (24, 24)]
    state = experiment.initial_state()
    found, _ = jax.eval_shape(experiment.train_step, state, tuple(views), experiment.key)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, state)


class FoundError(Exception):
    """Carries the arguments of a call out of a step."""


@pytest.mark.slow
def test_a_step_gives_the_views_the_keys_that_the_boxes_are_drawn_by(tmp_path, monkeypatch):
    def found(keys: Any, images: Any, _: Any) -> Any:
        raise FoundError(keys, images)

    write_squares(tmp_path, 48)
    experiment = experiment_on(tmp_path, "image", **{"train.num_micro_batches": 1})
    crops = experiment.host_crops
    assert crops is not None
    plan = pretraining.make_plan(experiment, validate=lambda _: {}, best_measure="")
    assert plan.crops == crops
    assert crops.resizer == "pillow"
    simd = experiment_on(tmp_path, "image", **{"augmentation.crop_resizer": "simd"}).host_crops
    assert simd == dataclasses.replace(crops, resizer="simd")
    assert experiment_on(tmp_path, "square").host_crops is None
    images: Any = batches.gather_crops(
        experiment.dataset.train, np.arange(16), crops.of_examples(7, np.arange(16))
    )
    monkeypatch.setattr(augmentations, "multi_view", found)
    state = experiment.initial_state()._replace(step=jnp.int32(7))
    with pytest.raises(FoundError) as caught:
        experiment.train_step(state, images, experiment.key)
    keys, seen = caught.value.args
    assert seen is images
    first = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 0), 5)[0])(keys)
    boxes = [crop_boxes.sample_crop(jax.random.split(k)[0], height=90, width=70) for k in first]
    drawn = [one.boxes(height=90, width=70)[0] for one in crops.of_examples(7, np.arange(16))]
    np.testing.assert_array_equal(drawn, boxes)
