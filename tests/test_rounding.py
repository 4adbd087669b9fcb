"""A run with kernels of 8 bits: what changes, what an export of it holds, and what is refused."""

import json

import jax
import numpy as np
import pytest

import jevb_jax
from jevb_jax import rounding
from jevb_jax.export import export_model
from jevb_jax.images.arrays import digits
from jevb_jax.runs import archive, files
from jevb_jax.runs.array_names import flatten_names
from jevb_jax.runs.checkpoints import Checkpointer
from jevb_jax.settings import config_versions
from tests.test_export import small_model


def write_run(directory, *, ema_decay: float = 0.0, keep_best: int = 0):
    """A run that nobody trained, with one checkpoint."""
    model = small_model()
    config = json.loads(json.dumps(model.config))
    config["train"]["ema_decay"] = ema_decay
    config["checkpoint"]["keep_best"] = keep_best
    evaluated = "ema_params" if ema_decay else "params"
    state = {"step": np.int32(7), **model.variables}
    state[evaluated] = state.pop("params")
    directory.mkdir()
    checkpointer = Checkpointer(directory / "checkpoints", keep_best=keep_best)
    on_device = jax.tree.map(jax.numpy.asarray, state)
    checkpointer.save(7, on_device, config=config, score=0.5)
    checkpointer.close()
    (directory / "environment.json").write_text('{"backend": "cpu"}')
    files.write_json_atomically(directory / "config.json", config)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("kept", [{}, {"ema_decay": 0.9, "keep_best": 1}], ids=["", "ema"])
def test_kernels_move_a_little_and_the_rest_stays(tmp_path, kept, capsys):
    source, target = write_run(tmp_path / "run", **kept), tmp_path / "rounded"
    assert rounding.main([f"--workdir={source}", f"--out={target}"]) == 0
    assert "step 7 rounded to 8 bits" in " ".join(capsys.readouterr().out.split())
    before = jevb_jax.load(source)
    after = jevb_jax.load(target, "best" if kept else None)
    assert after.step == 7
    assert (target / "environment.json").read_text() == '{"backend": "cpu"}'
    after_arrays = flatten_names(after.variables)
    for name, old in flatten_names(before.variables).items():
        new = np.asarray(after_arrays[name])
        if new.ndim < 2:
            np.testing.assert_array_equal(new, old, err_msg=name)
        else:
            largest = np.abs(np.asarray(old)).max(axis=tuple(range(new.ndim - 1)))
            moved = np.abs(new - old)
            assert moved.max() > 0, name
            assert np.all(moved <= largest / 252), name
    images = digits().images[:20]
    np.testing.assert_allclose(after.embed(images), before.embed(images), atol=0.1)


@pytest.mark.slow
def test_an_export_is_smaller_and_has_every_bit(tmp_path):
    rounding.main([f"--workdir={write_run(tmp_path / 'run')}", f"--out={tmp_path / 'rounded'}"])
    sizes = {}
    for name in ("run", "rounded"):
        model = jevb_jax.load(tmp_path / name)
        export_model(model, tmp_path / "export" / name)
        loaded = jevb_jax.load(tmp_path / "export" / name)
        jax.tree.map(np.testing.assert_array_equal, loaded.variables, model.variables)
        sizes[name] = (tmp_path / "export" / name / archive.WEIGHTS).stat().st_size
    assert sizes["rounded"] < 0.6 * sizes["run"]  # in so small a network, names and biases count
    packed = json.loads((tmp_path / "export/rounded" / archive.MANIFEST).read_text())["packed"]
    assert len(packed) > 5
    assert all("kernel" in name for name in packed)


def test_a_rounded_run_has_the_files_of_a_run(tmp_path):
    source = write_run(tmp_path / "run")
    config = json.loads((source / "config.json").read_text())
    files.write_json_atomically(source / "config.json", config_versions.versioned(config))
    (source / "extensions.json").write_text('[{"num_steps": 5, "until_step": 5}]')
    rounding.write_rounded_run(jevb_jax.load(source), source, tmp_path / "rounded")
    for name in ("config.json", "extensions.json"):
        found = [json.loads((one / name).read_text()) for one in (source, tmp_path / "rounded")]
        assert found[1] == found[0], name


def test_what_cannot_be_rounded_is_refused(tmp_path, capsys):
    source = write_run(tmp_path / "run")
    assert rounding.main([f"--workdir={source}", f"--out={source}"]) == 1
    assert "give another directory" in capsys.readouterr().err
    # What a killed call leaves: a checkpoint of another run, and no config yet.
    left = write_run(tmp_path / "left")
    (left / "config.json").unlink()
    assert rounding.main([f"--workdir={source}", f"--out={left}"]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert not (left / "config.json").exists()
    export_model(jevb_jax.load(source), tmp_path / "export")
    assert rounding.main([f"--workdir={tmp_path / 'export'}", f"--out={tmp_path / 'new'}"]) == 1
    assert "is an export" in capsys.readouterr().err
    assert rounding.main([f"--workdir={tmp_path / 'none'}", f"--out={tmp_path / 'new'}"]) == 1
    assert "holds neither" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
