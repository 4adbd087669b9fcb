"""Torchvision's names, held against a list that is written out here, and against torchvision itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jevb_jax.networks.resnet import ResNet, resnet18, resnet34, resnet50
from jevb_jax.networks.torch_names import from_torch, to_torch
from jevb_jax.networks.vit import ViT

NETWORKS = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50}
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}


def torchvision_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """What torchvision's `resnet.py` builds, by its own rules."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(prefix: str, channels: int) -> None:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{prefix}.{leaf}"] = (channels,)
        shapes[f"{prefix}.num_batches_tracked"] = ()

    bottleneck = name == "resnet50"
    expansion = 4 if bottleneck else 1
    shapes["conv1.weight"] = (64, 3, 7, 7)
    norm("bn1", 64)
    inplanes = 64
    for layer, (planes, blocks) in enumerate(
        zip((64, 128, 256, 512), BLOCKS[name], strict=True), 1
    ):
        for block in range(blocks):
            prefix = f"layer{layer}.{block}"
            out = planes * expansion
            convolutions = (
                [(planes, inplanes, 1), (planes, planes, 3), (out, planes, 1)]
                if bottleneck
                else [(planes, inplanes, 3), (planes, planes, 3)]
            )
            for index, (to, of, size) in enumerate(convolutions, 1):
                shapes[f"{prefix}.conv{index}.weight"] = (to, of, size, size)
                norm(f"{prefix}.bn{index}", to)
            if block == 0 and (layer > 1 or inplanes != out):
                shapes[f"{prefix}.downsample.0.weight"] = (out, inplanes, 1, 1)
                norm(f"{prefix}.downsample.1", out)
            inplanes = out
    shapes["fc.weight"], shapes["fc.bias"] = (1000, inplanes), (1000,)
    return shapes


def random_arrays(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.uniform(0.5, 1.5, size=shape).astype(np.float32)
        if shape
        else np.asarray(7, np.int64)
        for name, shape in shapes.items()
    }


def variables_of(network: Any) -> Any:
    images = jnp.zeros((1, 64, 64, 3))
    return jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=False))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_array_of_torchvision_goes_in_and_comes_out(name):
    arrays = random_arrays(torchvision_shapes(name))
    variables = from_torch(arrays, variables_of(NETWORKS[name](stem="imagenet")))
    back = to_torch(variables)
    left_out = {key for key in arrays if key.startswith("fc.") or key.endswith("_tracked")}
    assert set(back) == set(arrays) - left_out
    for key, array in back.items():
        np.testing.assert_array_equal(array, arrays[key])
    # One output channel of the first convolution: rows, columns and inputs, in this order.
    kernel = variables["params"]["stem_conv"]["kernel"]
    assert kernel[2, 5, 1, 33] == arrays["conv1.weight"][33, 1, 2, 5]
    assert variables["batch_stats"]["stem_bn"]["var"][3] == arrays["bn1.running_var"][3]


def test_what_does_not_fit_is_named():
    arrays = random_arrays(torchvision_shapes("resnet18"))
    wanted = variables_of(resnet18(stem="imagenet"))
    del arrays["layer2.0.bn1.running_mean"]
    arrays["layer9.0.conv1.weight"] = arrays["layer1.0.conv1.weight"]
    arrays["bn1.bias"] = arrays["bn1.bias"][:5]
    with pytest.raises(ValueError, match="torchvision's names") as caught:
        from_torch(arrays, wanted)
    message = str(caught.value)
    assert "missing from the weights: batch_stats.stage2_block1.bn1.mean" in message
    assert "only in the weights: layer9.0.conv1.weight" in message
    assert "params.stem_bn.bias: weights has ((5,)," in message
    assert message.count("\n") == 3
    with pytest.raises(ValueError, match=r"stem_conv\.kernel: weights has \(\(7, 7, 3, 64\)"):
        from_torch(
            random_arrays(torchvision_shapes("resnet18")), variables_of(resnet18(stem="cifar"))
        )


def test_other_networks_have_no_names_in_pytorch():
    vit = variables_of(ViT(patch_size=16, hidden_size=8, depth=1, num_heads=2))
    with pytest.raises(ValueError, match="only ResNets"):
        from_torch({}, {"batch_stats": {}, **vit})


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_the_installed_library(name, library):
    torch = pytest.importorskip("torch")
    installed = pytest.importorskip(library)
    torch.manual_seed(0)
    theirs = (
        installed.create_model(name) if library == "timm" else getattr(installed.models, name)()
    )
    theirs.fc = torch.nn.Identity()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:  # BatchNorm's: away from ones and zeros, also of a residual's end
            parameter.data += 0.1 + 0.1 * torch.randn_like(parameter)
    theirs.eval()
    arrays = {key: value.numpy() for key, value in theirs.state_dict().items()}
    network = NETWORKS[name](stem="imagenet")
    variables = from_torch(arrays, variables_of(network))
    images = np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float32)
    found = jax.jit(lambda: network.apply(variables, images, train=False))()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"{library} {name}: {difference:.1e}")
    assert difference < 1e-4


def test_a_small_network_survives_the_way_there_and_back():
    network = ResNet(stage_sizes=(1, 1), bottleneck=False, stem="cifar", width=4)
    images = jnp.ones((1, 8, 8, 3))
    variables = jax.jit(lambda: network.init(jax.random.key(1), images, train=False))()
    back = from_torch(to_torch(variables), variables)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)
