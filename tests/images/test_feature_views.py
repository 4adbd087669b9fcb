"""Features of a frozen encoder: their files, their views, and what is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jevb_jax.images import batches, data_record, dataset, feature_views, given, views
from jevb_jax.images.arrays import features
from jevb_jax.images.augmentations import ViewAugmentation
from jevb_jax.images.source import ArraySource, FeatureSource, Subset, is_of_features

MEAN = np.array([1.0, -2.0, 0.0, 5.0], np.float32)
STD = np.array([1.0, 2.0, 0.0, 0.5], np.float32)


def rows(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def view(noise_scale: float = 0.0, mask_probability: float = 0.0) -> feature_views.FeatureView:
    statistics = feature_views.ColumnStatistics(MEAN, STD)
    return feature_views.FeatureView(statistics, noise_scale, mask_probability)


def made_views(keys: Any, values: np.ndarray, random: Any, count: int = 2) -> Any:
    """The views, as one compiled program."""
    return jax.jit(lambda k, x: views.multi_view(k, x, (random,) * count))(keys, values)


def keys(count: int) -> Any:
    return jax.random.split(jax.random.key(3), count)


# --- Files ---


def test_files_are_read_in_order_and_converted(tmp_path):
    first, second = rows(3, 4), rows(2, 4, seed=1).astype(np.float64)
    np.savez(tmp_path / "a.npz", features=first.astype(np.float16), labels=[0, 1, 2], ignored=1)
    np.save(tmp_path / "b.npy", second)
    np.save(tmp_path / "b_labels.npy", np.array([2, 0]))
    found = features([tmp_path / name for name in ("a.npz", "b.npy", "b_labels.npy")])
    assert found.features.dtype == np.float32
    half = first.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found.features, np.vstack([half, second.astype(np.float32)]))
    np.testing.assert_array_equal(found.labels, [0, 1, 2, 2, 0])
    assert found[1].shape == (4,)
    np.save(tmp_path / "views.npy", rows(5, 3, 4))
    assert features([tmp_path / "views.npy"]).features.shape == (5, 3, 4)


@pytest.mark.parametrize("shape", [(4,), (3, 4)])
@pytest.mark.parametrize("is_fixed", [True, False])
def test_parquet_files_are_read_as_arrays_are(tmp_path, shape, is_fixed):
    values, labels = rows(7, *shape), np.arange(7) % 3
    kind: Any = pa.float32()
    for size in reversed(shape):
        kind = pa.list_(kind, size if is_fixed else -1)
    column = pa.array(values.tolist(), kind)
    table = pa.table({"other": ["x"] * 7, "features": column, "labels": labels})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    np.savez(tmp_path / "b.npz", features=values, labels=labels)
    found = features([tmp_path / "a.parquet", tmp_path / "b.npz"])
    np.testing.assert_array_equal(found.features, np.concatenate([values, values]))
    np.testing.assert_array_equal(found.labels, np.concatenate([labels, labels]))
    pq.write_table(table.slice(2, 3).drop(["labels"]), tmp_path / "part.parquet")
    alone = features(tmp_path / "part.parquet")
    np.testing.assert_array_equal(alone.features, values[2:5])
    assert alone.labels is None


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"x": [1.0]}, ValueError, r"no column `features`.*its columns are \['x'\]"),
        ({"features": [[1.0], [1.0, 2.0]]}, ValueError, r"must have one length, got \[1, 2\]"),
        ({"features": [[1.0], None]}, ValueError, "1 rows have no value"),
        ({"features": [[1.0, None]]}, ValueError, "1 numbers are missing"),
        (
            {"features": [{"a": 1.0}]},
            ValueError,
            "expected numbers or lists of numbers, got struct",
        ),
        ({"features": [1.0, 2.0]}, ValueError, r"\[N, F\]"),
        ({"features": [["a"]]}, TypeError, "float"),
        ({"features": [[1]]}, TypeError, "float"),
        ({"features": [[1.0, np.inf]]}, ValueError, "finite|infinit"),
    ],
)
def test_parquet_files_that_are_refused(tmp_path, columns, error, message):
    pq.write_table(pa.table(columns), tmp_path / "f.parquet")
    with pytest.raises(error, match=message) as found:
        features(tmp_path / "f.parquet")
    assert "f.parquet" in str(found.value)


def test_a_parquet_file_that_is_cut_short_is_damaged(tmp_path):
    pq.write_table(pa.table({"features": rows(50, 4).tolist()}), tmp_path / "f.parquet")
    content = (tmp_path / "f.parquet").read_bytes()
    for end in (4, 40, len(content) - 1):
        (tmp_path / "f.parquet").write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"f\.parquet cannot be read as an \.parquet file"):
            features(tmp_path / "f.parquet")


def test_one_file_of_labels_serves_several_files_of_features(tmp_path):
    for name, array in (("a", rows(3, 4)), ("b", rows(3, 4, seed=1)), ("y", np.array([2, 0, 1]))):
        np.save(tmp_path / f"{name}.npy", array)
    found = features([tmp_path / f"{name}.npy" for name in "ayby"])
    np.testing.assert_array_equal(found.features, np.vstack([rows(3, 4), rows(3, 4, seed=1)]))
    np.testing.assert_array_equal(found.labels, [2, 0, 1, 2, 0, 1])
    assert features(str(tmp_path / "a.npy")).labels is None


def test_features_of_a_wrong_type_are_refused_before_memory_is_taken(tmp_path, monkeypatch):
    np.save(tmp_path / "f.npy", rows(6, 4).astype(int))
    monkeypatch.setattr(np, "load", lambda *given, **keywords: pytest.fail("was read"))
    with pytest.raises(TypeError, match=r"f\.npy: expected features of type float32.* got int64"):
        features(tmp_path / "f.npy")


BAD = rows(6, 4)
BAD[4, 2] = np.nan
HUGE = rows(6, 4).astype(np.float64)
HUGE[2, 0] = 1e300


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ({"features": BAD}, ValueError, r"f\.npz: 1 of 6 rows hold NaN .* the first is row 4"),
        ({"features": HUGE}, ValueError, r"f\.npz: 1 of 6 rows .* the first is row 2"),
        ({"features": rows(6, 4).astype(int)}, TypeError, r"expected features of type float32"),
        ({"features": rows(6, 2, 2, 4)}, ValueError, r"shape \[N, F\], or \[N, V, F\]"),
        ({"features": rows(0, 4)}, ValueError, r"shape \[N, F\].* got \(0, 4\)"),
        (
            {"features": rows(6, 1, 4)},
            ValueError,
            r"one view of each example; give `features\[:, 0\]`",
        ),
        ({"features": rows(6, 4), "labels": [0, 1]}, ValueError, "each of the 6 examples"),
        ({"features": rows(6, 4), "labels": np.ones(6)}, TypeError, "integer labels"),
        ({"embeddings": rows(6, 4)}, ValueError, "has no entry `features`"),
    ],
)
def test_files_that_are_refused(entries, error, message, tmp_path):
    np.savez(tmp_path / "f.npz", **entries)
    with pytest.raises(error, match=message):
        features([tmp_path / "f.npz"])


def test_files_that_do_not_fit_each_other(tmp_path):
    for name, array in (("a", rows(3, 4)), ("b", rows(3, 5)), ("labels", np.arange(3))):
        np.save(tmp_path / f"{name}.npy", array)

    def read(*names: str) -> FeatureSource:
        return features([tmp_path / f"{name}.npy" for name in names])

    for names, message in (
        (("a", "b"), r"got \(4,\) in .*a\.npy and \(5,\) in .*b\.npy"),
        (("a", "a"), "repeated: .*a.npy"),
        (("a", "labels", "b", "labels"), r"got \(4,\) in .*labels\.npy and \(5,\)"),
        (("labels", "a"), "holds labels, but no .npy file of features"),
        ((), "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            read(*names)
    with pytest.raises(FileNotFoundError, match="no file at"):
        read("c")
    (tmp_path / "c.npy").write_bytes(b"\x93NUMPY damaged")
    with pytest.raises(ValueError, match=r"cannot be read as an \.npy file"):
        read("c")


def test_a_data_set_of_features_is_split_streamed_and_recorded(tmp_path):
    np.savez(tmp_path / "train.npz", features=rows(50, 4), labels=np.arange(50) % 5)
    np.savez(tmp_path / "test.npz", features=rows(10, 4, seed=1), labels=np.arange(10) % 5)
    paths = {name: (str(tmp_path / f"{name}.npz"),) for name in ("train", "test")}
    made = dataset.load_dataset(
        source="features", train_paths=paths["train"], test_paths=paths["test"]
    )
    assert (len(made.train), len(made.validation)) == (45, 5)
    assert is_of_features(made.train)
    whole = batches.load_resident(made.train)
    found = list(batches.evaluation_batches(made.train, 32))
    assert [mask.sum() for _, mask in found] == [32, 13]
    read = np.concatenate([batch[mask] for batch, mask in found])
    np.testing.assert_array_equal(read, whole)
    assert found[1][0].dtype == np.float32
    assert batches.fits_resident(made.train, limit_bytes=45 * 4 * 4)
    assert not batches.fits_resident(made.train, limit_bytes=45 * 4 * 4 - 1)
    before = data_record.fingerprint(made)
    changed = rows(50, 4)
    changed[7, 3] += 1e-6
    np.savez(tmp_path / "train.npz", features=changed, labels=np.arange(50) % 5)
    after = data_record.fingerprint(
        dataset.load_dataset(
            source="features", train_paths=paths["train"], test_paths=paths["test"]
        )
    )
    assert any("contents" in line for line in data_record.changes(before, after))
    np.savez(tmp_path / "test.npz", features=rows(10, 3), labels=np.arange(10) % 5)
    with pytest.raises(ValueError, match=r"training examples are \(4,\) in .*test\.npz"):
        dataset.load_dataset(
            source="features", train_paths=paths["train"], test_paths=paths["test"]
        )


# --- Statistics ---


def test_statistics_of_columns_agree_with_numpy(caplog):
    values = 3 + 2 * rows(9_001, 2, 4)
    values[..., 2] = 1e4
    values[::2, :, 2] = np.nextafter(np.float32(1e4), np.float32(2e4))  # rounding of a constant
    source = Subset(FeatureSource(values), np.arange(5_000))
    found = feature_views.column_statistics(source)
    kept = values[:5_000].reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(found.mean, kept.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.std[[0, 1, 3]], kept.std(axis=0)[[0, 1, 3]], rtol=1e-6)
    assert found.std[2] == 0
    assert "1 of 4 columns" in caplog.text
    with pytest.raises(ValueError, match=r"all 4 columns .* are constant"):
        feature_views.column_statistics(FeatureSource(np.ones((5, 4), np.float32)))


# --- Views ---


def test_noise_has_the_size_of_the_column_and_views_are_independent():
    values = np.tile(MEAN + 1, (20_000, 1))
    one, other = made_views(keys(len(values)), values, view(0.3))
    for made in (one, other):
        noise = np.asarray(made, np.float64) - values
        np.testing.assert_allclose(noise.std(axis=0), 0.3 * STD, rtol=0.03, atol=0)
        np.testing.assert_allclose(noise.mean(axis=0), 0, atol=0.3 * 2 * 4 / np.sqrt(20_000))
    standard = (np.asarray(one) - values)[:, [0, 1, 3]] / STD[[0, 1, 3]]
    second = (np.asarray(other) - values)[:, [0, 1, 3]] / STD[[0, 1, 3]]
    both = np.concatenate([standard, second], axis=1)
    correlation = np.corrcoef(both.T) - np.eye(6)
    assert np.abs(correlation).max() < 0.04


def test_masked_columns_have_their_mean_and_the_others_are_unchanged():
    values = np.asarray(10 + rows(20_000, 4))
    made = np.asarray(views.random_views(keys(len(values)), values, view(mask_probability=0.25)))
    is_masked = made == MEAN
    np.testing.assert_array_equal(made[~is_masked], values[~is_masked])
    np.testing.assert_allclose(is_masked.mean(axis=0), 0.25, atol=0.02)
    correlation = np.corrcoef(is_masked.T) - np.eye(4)
    assert np.abs(correlation).max() < 0.04


def test_stored_views_are_different_and_every_ordered_pair_is_as_likely():
    count, stored = 12_000, 4
    values = np.broadcast_to(np.arange(stored, dtype=np.float32)[:, None], (count, stored, 4))
    made = made_views(keys(count), values, view())
    first, second = (np.asarray(one) for one in made)
    assert (first == first[:, :1]).all()  # one view, not a mix of several
    pairs = (stored * first[:, 0] + second[:, 0]).astype(int)
    counts = np.bincount(pairs, minlength=stored**2).reshape(stored, stored)
    assert (np.diag(counts) == 0).all()
    np.testing.assert_allclose(counts[~np.eye(stored, dtype=bool)], count / 12, rtol=0.15)
    with pytest.raises(ValueError, match="5 different views need as many stored ones, got 4"):
        views.multi_view(keys(count), values, (view(),) * 5)


def test_views_are_a_pure_function_of_key_and_example():
    values = rows(8, 3, 4)
    random = view(0.5, 0.3)
    whole = made_views(keys(8), values, random)
    part = made_views(keys(8)[5:], values[5:], random)
    np.testing.assert_array_equal(np.stack(whole)[:, 5:], np.stack(part))
    with jax.enable_x64(True):
        wide = made_views(keys(8), values, random)
    assert {one.dtype for one in wide} == {jnp.dtype("float32")}
    np.testing.assert_allclose(np.stack(wide), np.stack(whole), rtol=1e-6, atol=1e-6)


def test_evaluation_reads_the_features_or_the_first_stored_view():
    random = view(0.5, 0.3)
    np.testing.assert_array_equal(views.plain_views(rows(5, 4), random), rows(5, 4))
    np.testing.assert_array_equal(views.plain_views(rows(5, 3, 4), random), rows(5, 3, 4)[:, 0])
    assert (views.view_shape(random), views.describe(random)) == ((4,), "features 4")
    assert views.visible_views(rows(5, 4), (random,)) == []


# --- Refusals ---


def test_networks_refuse_sources_of_another_kind_or_width():
    of_images = ViewAugmentation(8, (0.5,), (0.5,))
    pictures = ArraySource(np.zeros((2, 8, 8, 1), np.uint8), name="pictures")
    with pytest.raises(ValueError, match=r"pictures holds images, but .* made for features"):
        views.check_source(pictures, view())
    with pytest.raises(ValueError, match=r"mine holds features, but .* made for images"):
        views.check_source(FeatureSource(rows(3, 4), name="mine"), of_images)
    with pytest.raises(ValueError, match=r"mine has 5 features in a row, .* trained on 4"):
        views.check_source(FeatureSource(rows(3, 5), name="mine"), view())
    with pytest.raises(ValueError, match="one view, repeated"):
        views.multi_view(keys(3), rows(3, 4), (view(), dataclasses.replace(view())))


def test_given_features_are_checked():
    def check(values: Any, stored: int = 1) -> given.GivenImages:
        return given.check_features(values, num_features=4, num_stored_views=stored)

    assert check(rows(3, 4)).num_images == 3
    assert check(rows(1, 4)[0]).is_single
    assert check(rows(3, 4).astype(np.float16)).stacks[0].dtype == np.float32
    assert check(rows(3, 2, 4), stored=2).num_images == 3
    assert check(rows(2, 4), stored=2).num_images == 2
    for bad, stored in ((rows(3, 5), 1), (rows(3, 2, 4), 1), (rows(3, 3, 4), 2)):
        with pytest.raises(ValueError, match=r"trained on 4 features in a row: expected \[N, 4\]"):
            check(bad, stored)
    with pytest.raises(ValueError, match="1 of 6 rows hold NaN"):
        check(BAD)
    with pytest.raises(ValueError, match="no rows"):
        check(rows(0, 4))
    with pytest.raises(TypeError, match="floating point"):
        check(np.zeros((3, 4), int))
