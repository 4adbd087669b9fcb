"""Every setting has a domain, and what is outside of it is refused before anything is loaded."""

import contextlib
import copy
import dataclasses
import itertools
import math
import types
from typing import Any

import jax
import numpy as np
import pytest

from configs import default, finetune_default, ood, smoke, transfer
from jevb_jax import commands, finetuning
from jevb_jax.evaluation import evaluate, human_votes, readiness
from jevb_jax.images.source import ArraySource
from jevb_jax.methods import METHODS
from jevb_jax.paper.densities import SPACES
from jevb_jax.paper.likelihood import LIKELIHOODS, SCALE_UNITS
from jevb_jax.paper.mass import TAILS
from jevb_jax.paper.sphere import COORDINATES
from jevb_jax.runs import checkpoints
from jevb_jax.settings import read
from jevb_jax.training import experiment, from_settings
from jevb_jax.training.experiment import Experiment

INF, NAN = math.inf, math.nan


def values_of(config: Any) -> dict[str, Any]:
    """Plain values of the default config, whose data are made rather than read."""
    config.data.source = "shapes"
    return experiment.to_json_values(config)


RUN = values_of(default.get_config())
LEAVES = {key: pair[1] for key, pair in checkpoints.changed_keys({}, RUN).items()}


def changed(**settings: Any) -> dict[str, Any]:
    """The config with `section__key` set; not made plain, as nothing but `plain` would."""
    config = copy.deepcopy(RUN)
    for name, value in settings.items():
        *sections, key = name.split("__")
        where = config
        for section in sections:
            where = where[section]
        where[key] = value
    return config


def test_every_setting_is_in_the_table():
    assert set(read.RUN) == set(LEAVES)
    for mode in ("full", "frozen"):
        tuned = experiment.to_json_values(finetune_default.get_config(mode))
        assert set(read.FINETUNE) == set(checkpoints.changed_keys({}, tuned))
    read.run_settings(RUN)
    read.data_section(experiment.to_json_values(transfer.get_config("digits")))
    sections: list[Any] = [ood.get_config(protocol) for protocol in ood.PROTOCOLS]
    used = {key for section in sections for one in section.outside for key in one}
    assert used <= set(read.OUTSIDE_SET)


# Wrong whatever the setting is, by the type of its default.
HOSTILE: dict[type, list[Any]] = {
    bool: [None, 0, 1, "True", [True]],
    int: [None, True, 2.5, NAN, INF, -2, "3", [3], 3 + 0j],
    float: [None, True, NAN, -INF, -1e-9, "0.5", [0.5], 10**400],
    str: [None, 1, ["a"], b"a"],
    list: [None, 0.5, "ab", [None], [NAN], [True], [[1]], iter([1]), {1, 2}],
}


@pytest.mark.parametrize("key", LEAVES)
def test_what_cannot_be_meant_is_refused_by_name(key):
    hostile = HOSTILE[type(LEAVES[key])]
    if key == "train.num_epochs":  # parts of an epoch may be meant
        hostile = [value for value in hostile if value != 2.5]
    for value in hostile:
        with pytest.raises(ValueError, match=rf"^{key.replace('.', '[.]')} must be .*, got "):
            read.run_settings(read.plain(changed(**{key.replace(".", "__"): value})))


@pytest.mark.parametrize("key", LEAVES)
def test_hints_are_given_where_they_help(key):
    def said(value: Any) -> str:
        with pytest.raises(ValueError, match="must be") as refused:
            read.run_settings(changed(**{key.replace(".", "__"): value}))
        return str(refused.value)

    default, unknown, quotes = LEAVES[key], "no such name", ", a text: leave out the quotes"
    if isinstance(default, str):  # a choice of two reads "A or B"
        if not read.RUN[key].accepts(unknown):
            assert said(unknown).endswith(f", got {unknown!r}")
    elif isinstance(default, list):
        assert said(unknown).endswith((f", got {unknown!r}", f"; write ({unknown!r},)"))
        for item in default[:1]:
            one = said(item) if read.RUN[key].accepts([item]) else f"; write ({item!r},)"
            assert one.endswith(f"; write ({item!r},)")
    else:
        assert said(str(default)).endswith(f", got {str(default)!r}{quotes}")
        assert said(unknown).endswith(f", got {unknown!r}")


def test_what_is_without_its_quotes_a_value_is_shown_as_one():
    for key, value in (("jevb__df", "inf"), ("jevb__normalized", "True"), ("seed", "3")):
        with pytest.raises(ValueError, match=r"leave out the quotes$"):
            read.run_settings(changed(**{key: value}))
    with pytest.raises(
        ValueError, match=r"^model.dtype must be float32 or bfloat16, got 'float16'$"
    ):
        read.run_settings(changed(model__dtype="float16"))
    with pytest.raises(ValueError, match=r", got 'wandb'; write \('wandb',\)$"):
        read.run_settings(changed(train__writers="wandb"))


# Borders that the types do not give: accepted, refused.
BORDERS = {
    "seed": ([0, 2**32 - 1], [-1, 2**32, 2**64]),
    "train.ema_decay": ([0, 0.0, 0.9999], [1, 1.0, 1.5]),
    "train.target_decay": ([0, 0.99], [1.0]),
    "train.batch_size": ([2], [0, 1]),
    "train.log_every_steps": ([0, 1], [-1]),
    "train.health_every_steps": ([0], [-1]),
    "train.num_epochs": ([0.6, 20.5, 1000], [0, 0.0, INF]),
    "optimizer.momentum": ([0, 0.99], [1.0]),
    "optimizer.learning_rate": ([0, 1e-5, 3.2], [INF]),
    "optimizer.max_gradient_norm": ([0, 1.5], [INF]),
    "augmentation.crop_scale": ([[0.2, 1], [1, 1]], [[1, 0.2], [0, 1], [0.2, 1.1], [0.5], 0.5]),
    "augmentation.crop_ratio": ([[0.5, 2]], [[2, 0.5], [0, 1], [1, INF], [1, 2, 3]]),
    "augmentation.blur_kernel_size": ([0, 1, 9], [2]),
    "augmentation.hue": ([0, 0.5], [0.51]),
    "augmentation.flip_probability": ([0, 1], [1.01]),
    "augmentation.solarize_probability": ([[0, 1]], [[0, 2], [0.5], [], 0.5]),
    "augmentation.std": ([[0.2, 0.3, 0.4]], [[0.2, 0, 0.4], [0.2, -0.3], []]),
    "augmentation.mean": ([[0, -1, 0.4], [0.1] * 12], [[], [0.1, 0.2, INF]]),
    "data.validation_fraction": ([0.01, 0.99], [0, 1, 0.0, 1.0]),
    "data.dtype": (["uint8", "uint16", "float32"], ["float64", ""]),
    "data.value_range": ([[], [-400, 400]], [400, ["a", 1], [0, INF]]),
    "data.exif": (["apply", "ignore"], ["", True]),
    "data.inlier_class": ([-1, 0, 9], [-2]),
    "data.inlier_classes": ([[], [0], [3, 1]], [[-1], [1.5], 3]),
    "model.projector_hidden_dims": ([[1]], [[], [0], [2.0]]),
    "model.initial_radial_scale": ([0.5], [1e-3, 0]),
    "jevb.df": ([0.5, 5, INF], [0, 0.0]),
    "jevb.prior_scale": ([0.1], [0, INF]),
    "evaluation.knn_k": ([[1], [20, 200]], [[], [0], [20.0], [-1, 5], 20]),
    "evaluation.l2_grid": ([[0, 1e-3]], [[], [-1e-3], [INF]]),
    "evaluation.batch_size": ([1], [0]),
    "evaluation.labels_per_class": ([0, 1], [-1]),
    "evaluation.knn_temperature": ([0.07], [0, INF]),
    "evaluation.knn_uniform_k": ([[], [10]], [[0], [10.0], 10]),
    "train.knn_every_epochs": ([0, 10], [-1, 0.5]),
    "train.writers": ([[], ["auto"], ["wandb", "mlflow"]], [["comet"], "wandb", [1]]),
    "ood.severities": ([[1, 3, 5], [5]], [[5, 1], [2, 2], [0], [6]]),
    "ood.residual_share": ([0.01], [0, 1]),
    "ood.mixture_df": ([INF, 1], [0]),
    "ood.csi_crops": ([0, 10], [-1, 0.5]),
    "ood.corruptions": ([[], ["contrast"]], [["fog"], "contrast"]),
    "checkpoint.keep_latest": ([1, 5], [0]),
    "checkpoint.every_steps": ([0], [-1]),
    "input.prefetch_batches": ([1], [0]),
}


@pytest.mark.parametrize("key", BORDERS)
def test_borders_of_a_domain(key):
    good, bad = BORDERS[key]
    assert all(read.RUN[key].accepts(value) for value in good)
    assert not any(read.RUN[key].accepts(value) for value in bad)


def test_off_is_said_where_it_is_not_minus_one():
    for key, off in (("train.ema_decay", "0 = off"), ("checkpoint.keep_best", "0 = off"),
                     ("ood.max_fit_images", "0 = all"), ("optimizer.max_gradient_norm", "0 = no"),
                     ("train.bn_group_size", "0 = all examples of a micro-batch")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{key} .*{off}.*got -1$"):
            read.run_settings(changed(**{key.replace(".", "__"): -1}))


def test_numpys_values_are_plain_ones():
    given = changed(
        train__batch_size=np.int64(64),
        train__ema_decay=np.float32(0.5),
        train__health_pairs=np.bool_(True),
        evaluation__knn_k=np.array([5, 10]),
        evaluation__l2_grid=(np.float64(0.1), np.float32(0.5)),
        ood__severities=range(1, 4),
    )
    plain = read.plain(given)
    read.run_settings(plain)
    assert plain["evaluation"] | {"knn_k": [5, 10], "l2_grid": [0.1, 0.5]} == plain["evaluation"]
    kinds = [type(plain["train"][k]) for k in ("batch_size", "ema_decay", "health_pairs")]
    assert kinds == [int, float, bool]
    assert plain["ood"]["severities"] == [1, 2, 3]


def test_all_mistakes_are_in_one_message():
    with pytest.raises(ValueError, match=r"^2 settings cannot be used:") as error:
        read.run_settings(changed(train__ema_decay=2.0, jevb__df=-1.0))
    assert "train.ema_decay" in str(error.value)
    assert "jevb.df" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train__health_pairs": True, "method": "vicreg"}, "health_pairs needs method jevb"),
        ({"train__batch_size": 2, "train__num_micro_batches": 2}, "leaves 1 example"),
        ({"augmentation__std": [0.2]}, "one value for each channel, got 3 and 1"),
        ({"model__backbone": "vit_tiny", "model__patch_size": 5}, "patch_size = 5 must divide"),
        ({"model__backbone": "timm_vit_tiny", "model__patch_size": 5}, "patch_size = 5 must divide"),
        ({"model__backbone": "dinov2_small", "model__patch_size": 14}, "patch_size = 14 must divide"),
        ({"model__pool": "max"}, "model.pool must be class or mean"),
        ({"init__frozen_stages": 1}, "keeps weights of init.workdir, which is empty"),
        ({"optimizer__layer_decay": 0.0}, r"optimizer.layer_decay must be a number in \(0, 1\]"),
        ({"model__min_scale": 1.0}, "min_scale = 1.0 must be below model.initial_scale"),
        ({"jevb__tails": "feature", "jevb__coordinates": "stereographic"}, "chordal"),
        ({"model__embedding_dim": 2}, "model.embedding_dim = 2 must be at least 3"),
        ({"method": "vi_simsiam", "model__embedding_dim": 1}, "must be at least 2"),
        ({"optimizer__warmup_epochs": 200}, "must be shorter than the run"),
        ({"ood__corruptions": ["crop"], "ood__severities": []}, "ood.severities is empty"),
        ({"ood__corruptions": ["crop", "crop"]}, "names one twice"),
        ({"data__source": "arrays"}, "data.train_paths must name .npz or .npy"),
        ({"data__source": "tfds"}, "data.tfds_name must name"),
        ({"data__source": "paths"}, "data.train_paths must name one text or CSV file"),
        ({"data__skip_broken": "skip"}, "data.skip_broken = .*got data.source = 'shapes'"),
        ({"augmentation__crop_from": "image"}, 'needs picture files.*got "shapes"'),
        (
            {"augmentation__crop_from": "image", "input__placement": "resident"},
            'set input.placement = "resident" to "stream" or "auto"',
        ),
        ({"augmentation__crop_resizer": "simd"}, 'needs augmentation.crop_from = "image"'),
        (
            {
                "data__source": "folder",
                "augmentation__crop_from": "image",
                "augmentation__crop_resizer": "simd",
                "augmentation__interpolation": "bicubic",
            },
            'bilinear crops of color or gray with 8 bits, got .*"bicubic".* set it to "pillow"',
        ),
        ({"augmentation__blur_kernel_size": 65, "augmentation__blur_probability": [0, 1]}, "wide"),
    ],
)  # fmt: skip
def test_settings_that_are_wrong_together(settings, message):
    with pytest.raises(ValueError, match=message):
        read.run_settings(changed(**settings))


@pytest.mark.parametrize(
    ("probability", "is_refused"), [([0.0, 0.5], False), ([0.5, 0.0], True), ([0.0, 0.0], False)]
)
def test_a_kernel_must_fit_the_small_crops_only_where_these_are_blurred(probability, is_refused):
    config = changed(
        augmentation__blur_kernel_size=23,
        augmentation__blur_probability=probability,
        augmentation__small_crop_size=10,
        augmentation__num_small_crops=2,
    )
    refused = pytest.raises(ValueError, match=r"10 pixels \(augmentation.small_crop_size\)")
    with refused if is_refused else contextlib.nullcontext():
        read.run_settings(config)
    # What the settings allow can be made, and runs.
    if not is_refused:
        section = read.run_settings(config).augmentation
        small = from_settings.view_augmentations(section)[-1]
        shape = jax.eval_shape(small, jax.random.key(0), np.zeros((32, 32, 3), np.uint8)).shape
        assert shape == (10, 10, 3)


@pytest.mark.parametrize("method", METHODS)
def test_settings_that_pass_make_the_settings_of_the_loss_whatever_the_method(method):
    target = 0.9 if METHODS[method].target == "needed" else 0.0
    fitting = changed(method=method, train__target_decay=target)
    choices: dict[str, tuple[str, ...]] = {
        "tails": TAILS,
        "coordinates": COORDINATES,
        "likelihood": LIKELIHOODS,
        "space": SPACES,
        "scale_units": SCALE_UNITS,
    }
    num_made = 0
    for values in itertools.product(*choices.values()):
        asked = dict(zip(choices, values, strict=True))
        config = fitting | {"jevb": fitting["jevb"] | asked}
        if asked["tails"] == "feature" and asked["coordinates"] == "stereographic":
            with pytest.raises(ValueError, match=r'^jevb.tails = "feature" needs jevb.coordinates'):
                read.run_settings(config)
        else:
            made = from_settings.jevb_settings(read.run_settings(config), steps_per_epoch=1)
            assert dataclasses.asdict(made.likelihood).items() >= asked.items()
            num_made += 1
    assert num_made == 24


def outside(**keys: Any) -> dict[str, Any]:
    return ood.outside_set("a", "far", "arrays", paths=("a.npz",)) | keys


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([outside(), outside()], "two sets are called 'a'"),
        ([outside(group="corrupted")], "group of the corrupted images"),
        ([outside(name="crop_3")], "the evaluation makes itself"),
        ([outside(path="a.npz")], "has path, which no set has"),
        ([{"name": "a", "source": "arrays"}], "lacks group, protocol"),
        ([outside(source="digits")], r"ood.outside\[0\].source must be one of"),
        ([outside(num_examples=-1)], r"ood.outside\[0\].num_examples must be an integer"),
        (["a.npz"], "ood.outside must be a tuple of outside sets"),
    ],
)
def test_outside_sets_are_checked_key_by_key(sets, message):
    with pytest.raises(ValueError, match=message):
        read.run_settings(read.plain(changed(ood__outside=sets)))


def test_keys_are_those_of_the_script():
    tuned: Any = finetune_default.get_config()
    with pytest.raises(ValueError, match=r"a config for finetune\.py, but train\.py needs its own"):
        experiment.build_experiment(tuned)
    with pytest.raises(ValueError, match=r"a config for train\.py, but finetune\.py needs its own"):
        finetuning.finetune(RUN, "unused")
    with pytest.raises(
        ValueError, match=r"train.batchsize is no setting; did you mean train.batch_"
    ):
        read.run_settings(changed(train__batchsize=3))
    without = copy.deepcopy(RUN)
    del without["train"]["ema_decay"]
    with pytest.raises(ValueError, match=r"the config lacks train\.ema_decay"):
        read.run_settings(without)
    with pytest.raises(ValueError, match=r"data\.method is no setting"):
        read.data_section(RUN)
    full: Any = experiment.to_json_values(tuned) | {"seed": -1}
    full["data"]["source"] = "digits"
    with pytest.raises(
        ValueError, match=r"seed must be(.|\n)*init.workdir must be a text that is not"
    ):
        finetuning.finetune(full, "unused")


@pytest.fixture(scope="module")
def built() -> Experiment:
    config: Any = smoke.get_config()
    config.data.update({"num_train_examples": 160, "num_test_examples": 40})
    return experiment.build_experiment(config)


def with_settings(built: Experiment, section: str, **keys: Any) -> Experiment:
    config = built.config | {section: built.config[section] | keys}
    return dataclasses.replace(built, config=config, settings=read.saved_settings(config))


@pytest.mark.parametrize(
    ("section", "keys", "error", "message"),
    [
        ("ood", {"default_score": "jevb/klx"}, ValueError, "ood.default_score must be one of"),
        ("ood", {"knn_k": [161]}, ValueError, r"ood.knn_k = \(161,\) must be at most 160"),
        ("ood", {"ssd_clusters": [99], "max_fit_images": 60}, ValueError, "ssd_clusters .* at most 60"),
        ("ood", {"outside": [outside()]}, FileNotFoundError, r"ood.outside\[0\], 'a': no file at"),
        ("ood", {"choice": [outside()]}, FileNotFoundError, r"ood.choice\[0\], 'a': no file at"),
        ("ood", {"outside": [outside(group="shifted", paths=("unlabeled.npy",))]}, ValueError,
         r"ood.outside\[0\], 'a': accuracy is measured .* has no labels"),
        ("ood", {"human_counts_path": "no.npz"}, FileNotFoundError, r"no\.npz"),
    ],
)  # fmt: skip
def test_an_evaluation_that_would_fail_is_refused_before_training(
    built, tmp_path, monkeypatch, section, keys, error, message
):
    monkeypatch.chdir(tmp_path)
    np.save("unlabeled.npy", np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(error, match=message):
        readiness.check(with_settings(built, section, **keys))


@pytest.mark.parametrize(("size", "severities"), [(20, [1, 5]), (18, [3]), (9, [1])])
def test_images_that_a_corruption_cannot_divide_are_refused(built, size, severities):
    images = ArraySource(np.zeros((2, size, size, 3), np.uint8))
    test = dataclasses.replace(built, dataset=built.dataset._replace(test=images))
    asked = {"corruptions": ["contrast", "patch_shuffle"], "severities": severities}
    with pytest.raises(
        ValueError, match=rf"patch_shuffle, severity {severities[-1]}: .* divisible"
    ):
        readiness.check(with_settings(test, "ood", **asked))
    readiness.check(with_settings(test, "ood", **asked | {"corruptions": ["contrast"]}))


def test_outside_images_and_votes_fit_the_run(built, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = with_settings(built, "ood", default_score="probe/energy", outside=[outside()])
    np.savez("a.npz", images=np.zeros((3, 20, 20, 1), np.uint8))
    readiness.check(good)  # other sizes and grey images are brought to the network's
    np.savez("votes.npz", cifar10h_counts=np.ones((39, 10)))
    with pytest.raises(ValueError, match="40 images are evaluated"):
        readiness.check(with_settings(built, "ood", human_counts_path="votes.npz"))
    np.savez("votes.npz", other=np.ones((40, 10)))
    with pytest.raises(ValueError, match="no entry `cifar10h_counts`"):
        readiness.check(with_settings(built, "ood", human_counts_path="votes.npz"))


def test_votes_are_read_also_if_every_score_was_left_out(built, tmp_path):
    np.savez(tmp_path / "votes.npz", cifar10h_counts=np.ones((40, 10)))
    asked = with_settings(built, "ood", human_counts_path=str(tmp_path / "votes.npz"))
    found: Any = types.SimpleNamespace(inside={})
    assert evaluate._disagreement_results(asked, found, 40) == []


def test_files_that_hold_no_votes_are_refused_by_name(tmp_path):
    votes = tmp_path / "votes.npz"
    np.savez(votes, cifar10h_counts=np.ones((40, 10)))
    np.testing.assert_array_equal(human_votes.read_votes(str(votes), num_images=40), 1)
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(votes.read_bytes()[:-40])
    np.save(tmp_path / "votes.npy", np.ones((40, 10)))
    np.savez(tmp_path / "none.npz", cifar10h_counts=np.zeros((40, 10)))
    np.savez(tmp_path / "text.npz", cifar10h_counts=np.full((40, 10), "a"))
    for name, error, message in (
        ("damaged.npz", ValueError, "cannot be read"),
        ("votes.npy", ValueError, "it is an .npy file"),
        ("none.npz", ValueError, "with a vote for each image"),
        ("text.npz", ValueError, "must be real numbers"),
        ("nowhere.npz", FileNotFoundError, "nowhere"),
    ):
        with pytest.raises(error, match=message):
            human_votes.read_votes(str(tmp_path / name), num_images=40)


def unlabeled(built: Experiment, **parts: Any) -> Experiment:
    dataset = built.dataset._replace(
        train=dataclasses.replace(built.dataset.train, has_labels=False),  # pyright: ignore[reportArgumentType]
        **parts,
    )
    return dataclasses.replace(built, dataset=dataset)


def test_a_default_score_that_no_evaluation_can_give_is_refused(built):
    one_class = ArraySource(np.zeros((30, 8, 8, 3), np.uint8), np.zeros(30, np.int64))
    others = dataclasses.replace(one_class, labels=np.full(30, 8))
    two_classes = dataclasses.replace(one_class, labels=np.arange(30) % 2)

    def of(**parts: Any) -> Experiment:
        return dataclasses.replace(built, dataset=built.dataset._replace(**parts))

    for asked in ({}, {"corruptions": ()}):  # with detection, and without
        wants = {"default_score": "probe/energy"} | asked
        readiness.check(with_settings(built, "ood", **wants))
        for data, reason in (
            (unlabeled(built), "the images have no labels"),
            (of(train=one_class), "all training images are of one class, 0"),
            (
                of(train=two_classes, validation=others),
                "no validation image is of a class of the training images",
            ),
        ):
            with pytest.raises(
                ValueError, match=f"'probe/energy' needs a linear probe, but {reason}"
            ):
                readiness.check(with_settings(data, "ood", **wants))
        with pytest.raises(ValueError, match="default_score must be one of"):
            readiness.check(with_settings(built, "ood", **wants | {"default_score": "jevb/klx"}))


def test_the_best_checkpoints_need_labels(built):
    readiness.check(unlabeled(built))
    reason = r"needs k-NN on the validation split: the images have no labels\. Set it to 0"
    with pytest.raises(ValueError, match=rf"^checkpoint.keep_best = 1 {reason}$"):
        readiness.check(with_settings(unlabeled(built), "checkpoint", keep_best=1))
    with pytest.raises(ValueError, match=rf"^train.knn_every_epochs = 5 {reason}$"):
        readiness.check(with_settings(unlabeled(built), "train", knn_every_epochs=5))


def test_refused_settings_leave_nothing_behind(tmp_path):
    config: Any = smoke.get_config()
    config.ood.outside = (outside(paths=(str(tmp_path / "no.npz"),)),)
    config.data.update({"num_train_examples": 160, "num_test_examples": 40})
    with pytest.raises(FileNotFoundError, match=r"ood\.outside"):
        commands.train(config, tmp_path / "run")
    config.train.ema_decay = 1.0
    with pytest.raises(ValueError, match="ema_decay"):
        commands.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
