"""Exports: equal to the model on real images, and refused when a bit is wrong."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from configs import digits as digits_config
from jevb_jax import export, loading
from jevb_jax.detector import write_model
from jevb_jax.images.arrays import digits
from jevb_jax.loading import load
from jevb_jax.model import Model
from jevb_jax.runs import archive
from jevb_jax.runs.archive import ArchiveError
from jevb_jax.settings import read
from jevb_jax.training.experiment import to_json_values
from tests.marks import nightly


def small_model(method: str = "jevb", *, square_size: int = 0, **model: Any) -> Model:
    config: Any = digits_config.get_config()
    config.method = method
    config.data.image_size = square_size
    config.model.width = 4
    config.model.projector_hidden_dims = (16,)
    config.model.embedding_dim = 8
    config.model.head_hidden_dim = 8
    config.model.update(model)
    config.jevb.df = float("inf")  # JSON must carry it
    values = to_json_values(config)
    leaves, tree = jax.tree.flatten(loading.variable_shapes(read.saved_settings(values)))
    random = np.random.default_rng(0)
    arrays = [random.normal(0, 0.3, leaf.shape).astype(leaf.dtype) for leaf in leaves]
    variables = jax.tree.unflatten(tree, arrays)
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])  # variances
    return Model(values, variables, step=7)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model, directory = small_model(), tmp_path_factory.mktemp("exports") / "digits"
    export.export_model(model, directory)
    return model, directory


@pytest.fixture
def copy(exported, tmp_path):
    for file in exported[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.slow
def test_served_function_equals_the_model_on_real_digits_for_any_batch(exported):
    model, directory = exported
    images = digits().images
    served = export.read_serving(directory)
    assert served.platforms == export.PLATFORMS
    # Any batch: the same program, without another export.
    for batch in (images[:1], images[:37], images[:128]):
        outputs: Any = served.call(batch)
        mean, scale = model.posterior(batch)
        expected = {
            "embedding": model.embed(batch),
            "representation": model.represent(batch),
            "posterior_mean": mean,
            "posterior_scale": scale,
        }
        assert outputs.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(outputs[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
    # The readme's way, with JAX alone.
    plain = jax.export.deserialize(bytearray((directory / export.SERVED).read_bytes()))
    np.testing.assert_array_equal(
        plain.call(images[:3])["embedding"], served.call(images[:3])["embedding"]
    )


@pytest.mark.slow
def test_photos_are_served_as_the_model_sees_them(tmp_path):
    # Read to 12 pixels and seen at 8, as 256 and 224 are.
    model = small_model(square_size=12)
    y, x = np.mgrid[:20, :33]
    photo = np.rint(127.5 + 127 * np.sin(x / 3) * np.cos(y / 4)).astype(np.uint8)[None, ..., None]
    height, width = np.int64(20), np.asarray(33)
    export.export_model(model, tmp_path / "x", height=height, width=width)  # pyright: ignore[reportArgumentType]
    embedded = model.embed(photo)
    served: Any = export.read_serving(tmp_path / "x").call(photo)
    difference = np.linalg.norm(served["embedding"] - embedded) / np.linalg.norm(embedded)
    assert difference < 1e-2  # a level between two may be the other
    squashed = model.with_square_size(0).embed(photo[:, :, ::2])
    assert np.linalg.norm(squashed - embedded) / np.linalg.norm(embedded) > 0.05
    # The archive remembers the size that its photos are read to, also where it is not the config's.
    np.testing.assert_allclose(load(tmp_path / "x").embed(photo), embedded, rtol=1e-5, atol=1e-5)
    write_model(model.with_square_size(16), tmp_path / "y", manifest={}, extra_files={})
    assert load(tmp_path / "y").square_size == 16
    finetuned = {"config": model.config, "finetuned": {"data": {"image_size": 20}}}
    assert loading._saved_square_size(finetuned) == 20
    assert loading._saved_square_size({"config": model.config}) == 12


@pytest.mark.slow
def test_an_export_is_made_and_loaded_in_a_process_of_64_bits(exported, tmp_path):
    model, directory = exported
    images = digits().images[:5]
    expected = model.embed(images)
    with jax.enable_x64(True):
        np.testing.assert_allclose(load(directory).embed(images), expected, rtol=1e-5, atol=1e-6)
        served: Any = export.read_serving(directory).call(images)
        assert served["embedding"].dtype == np.float32
        shapes = {str(leaf.dtype) for leaf in jax.tree.leaves(load(directory).variables)}
        assert shapes == {"float32"}
    np.testing.assert_allclose(served["embedding"], expected, rtol=1e-5, atol=1e-6)


def test_archive_is_the_model(exported):
    model, directory = exported
    loaded = load(directory)
    assert loaded.step == 7
    assert loaded.config == model.config
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, model.variables)
    manifest = json.loads((directory / archive.MANIFEST).read_text())
    assert manifest["arrays"]["params.projector.dense_out.kernel"] == {
        "shape": [16, 8],
        "dtype": "float32",
    }
    assert {file.name for file in directory.iterdir()} == {"model.json", *manifest["files"]}
    with pytest.raises(ValueError, match="holds one step"):
        load(directory, 7)


@pytest.mark.parametrize("name", [archive.WEIGHTS, export.SERVED])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_damaged_files_are_refused(copy, name, damage):
    content = bytearray((copy / name).read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 1
    elif damage == "cut":
        del content[-1:]
    (copy / name).write_bytes(content)
    if damage == "gone":
        (copy / name).unlink()
    read = load if name == archive.WEIGHTS else export.read_serving
    with pytest.raises(ArchiveError, match=f"{name} is (not what was written|missing)"):
        read(copy)


def test_a_changed_manifest_is_refused(copy):
    path = copy / archive.MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"step": 7', '"step": 8'))
    with pytest.raises(ArchiveError, match="not what was written"):
        load(copy)
    path.write_text(text[:-20])
    with pytest.raises(ArchiveError, match="is damaged"):
        load(copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither config.json"):
        load(copy)


def test_arrays_that_do_not_fit_the_config_are_named(tmp_path):
    model = small_model()
    arrays = {f"{i}": np.zeros(2, np.float32) for i in range(2)}
    manifest = {"config": model.config, "step": 0}
    archive.write_archive(tmp_path, arrays=arrays, manifest=manifest, extra_files={})
    with pytest.raises(ArchiveError, match="does not fit its config") as error:
        load(tmp_path)
    assert "missing from the export: params.head.mean_head.bias" in str(error.value)
    assert "only in the export: 1" in str(error.value)


@pytest.mark.parametrize("failing", [1, 3])
def test_an_export_for_which_there_is_no_room_leaves_the_one_before(
    exported, copy, monkeypatch, failing
):
    calls = []

    def full_disk(_: int) -> None:
        calls.append(1)
        if len(calls) == failing:
            raise OSError("no space left on device")

    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    monkeypatch.setattr(archive.files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        export.export_model(small_model("simsiam"), copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert repr(load(copy)) == repr(exported[0])


def test_commands_that_cannot_work_say_so(exported, tmp_path, capsys):
    assert export.main([f"--workdir={tmp_path}", f"--out={tmp_path}/out"]) == 1
    assert "neither config.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export.main([f"--workdir={tmp_path}", "--out=x", "--step=last"])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run"):
        export.export_model(exported[0], tmp_path)
    with pytest.raises(ValueError, match="cannot be served"):
        export.export_model(exported[0], tmp_path / "other", height=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"backbone": "resnet8"}, nightly({"backbone": "vit_tiny", "width": 48})]
)
@pytest.mark.parametrize(
    "method", [pytest.param("vi_simsiam", marks=pytest.mark.nightly), "vicreg"]
)
def test_every_kind_of_network_is_served_at_another_size(settings, method):
    model = small_model(method, **settings)
    served = jax.export.deserialize(bytearray(export.export_serving(model, height=12, width=20)))
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 20, 1), np.uint8)
    outputs: Any = served.call(images)
    assert outputs.keys() == {"embedding", "representation"}
    np.testing.assert_allclose(outputs["embedding"], model.embed(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["export", "detector"])
def test_weights_of_another_program_are_not_replaced(tmp_path, kind):
    archive.check_free(tmp_path / "new", kind=kind)
    archive.check_free(tmp_path, kind=kind)
    (tmp_path / "model.safetensors").write_text("of another program")
    with pytest.raises(ValueError, match=r"holds model\.safetensors without model\.json"):
        archive.check_free(tmp_path, kind=kind)
