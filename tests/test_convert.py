"""A trained ResNet or vision transformer as a file for PyTorch."""

import types
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import numpy as safetensors
from safetensors import safe_open

from configs import smoke
from jevb_jax import convert
from jevb_jax.detector import write_model
from jevb_jax.model import Model
from jevb_jax.networks.torch_names import from_torch, to_torch
from jevb_jax.start_weights import start_variables
from jevb_jax.training.experiment import build_experiment, to_json_values


@pytest.fixture(scope="module")
def model() -> Model:
    config: Any = smoke.get_config()
    config.model.backbone = "resnet8"
    variables = jax.jit(build_experiment(config).initial_state)().evaluation_variables
    return Model(to_json_values(config), variables, step=0)


@pytest.mark.slow
def test_the_command_writes_the_backbone_and_what_its_images_need(model, tmp_path):
    write_model(model, tmp_path / "export", manifest={}, extra_files={})
    file = tmp_path / "resnet8.safetensors"
    assert convert.main([f"--workdir={tmp_path / 'export'}", f"--out={file}"]) == 0
    wanted = {part: model.variables[part]["backbone"] for part in ("params", "batch_stats")}
    found = from_torch(safetensors.load(file.read_bytes()), wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    assert (metadata["backbone"], metadata["stem"]) == ("resnet8", "cifar")
    assert metadata["mean"] == "[0.4914, 0.4822, 0.4465]"


@pytest.mark.slow
def test_a_vision_transformer_comes_out_of_a_run_as_it_went_in(tmp_path):
    """File to training, to an export, to a file: every bit, and what its images need."""
    config: Any = smoke.get_config()
    config.model.backbone, config.model.width, config.model.patch_size = "dinov2_small", 12, 8
    config.init.workdir = str(tmp_path / "given.safetensors")
    experiment = build_experiment(config)
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(  # from the shapes alone: nothing is compiled
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(experiment.initial_state).evaluation_variables,
    )
    given = to_torch({"params": drawn["params"]["backbone"]})
    extra = {"mask_token": np.zeros((1, 12), np.float32)}
    (tmp_path / "given.safetensors").write_bytes(safetensors.save({**given, **extra}))
    start = start_variables(experiment)
    variables = jax.tree.map(np.zeros_like, drawn)
    variables["params"]["backbone"] = start["params"]["backbone"]
    model = Model(to_json_values(config), variables, step=0)
    write_model(model, tmp_path / "export", manifest={}, extra_files={})
    file = tmp_path / "back.safetensors"
    assert convert.main([f"--workdir={tmp_path / 'export'}", f"--out={file}"]) == 0
    found = safetensors.load(file.read_bytes())
    assert set(found) == set(given)
    for name, array in given.items():
        np.testing.assert_array_equal(found[name], array)
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    assert metadata["backbone"] == "dinov2_small"
    assert (metadata["patch_size"], metadata["image_size"]) == ("8", "16")


@pytest.mark.slow
@pytest.mark.nightly
def test_a_model_as_nnx_computes_the_same(model):
    views = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)
    module = model.as_nnx()
    assert isinstance(module, nnx.Module)
    expected = model.network.apply(model.variables, views, train=False)
    jax.tree.map(np.testing.assert_array_equal, module(views, train=False), expected)
    num_weights = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
    assert num_weights == sum(leaf.size for leaf in jax.tree.leaves(model.variables["params"]))


def test_mistakes_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        convert.main(["--workdir=x", "--out=resnet8.pt"])
    assert "--out must end in .safetensors" in capsys.readouterr().err
    assert convert.main([f"--workdir={tmp_path}", f"--out={tmp_path / 'x.safetensors'}"]) == 1
    assert "neither config.json" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_a_network_without_batchnorm_is_refused(model):
    variables = {"params": {"backbone": {"patch_embedding": {}}}}
    other: Any = types.SimpleNamespace(variables=variables, settings=model.settings)
    with pytest.raises(ValueError, match="only ResNets and the backbones timm_vit_"):
        convert.torch_weights(other)
