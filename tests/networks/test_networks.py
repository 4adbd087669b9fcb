"""Networks against NumPy float64 forwards and against known parameter counts."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import cifar10
from jevb_jax.networks import joint
from jevb_jax.networks.class_token_vit import dinov2_small
from jevb_jax.networks.heads import (
    HEAD_INPUTS,
    DirectionalPrediction,
    DirectionalPredictor,
    InferenceNetwork,
    Predictor,
    Projector,
    head_features,
)
from jevb_jax.networks.joint import JointEmbeddingModel
from jevb_jax.networks.resnet import ConvNet, ResidualBlock, ResNet, resnet18, resnet34, resnet50
from jevb_jax.networks.torch_names import torch_name
from jevb_jax.networks.vit import ViT, sincos_position_embedding, vit_small, vit_tiny
from jevb_jax.settings import read
from jevb_jax.training import from_settings
from tests.marks import nightly

# float32 against float64 through at most a dozen layers of unit-sized activations.
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)

TINY_BACKBONES = {
    "resnet": ResNet(stage_sizes=(1, 1), bottleneck=False, stem="cifar", width=6),
    "convnet": ConvNet(widths=(6, 8), convs_per_stage=1),
    "vit": ViT(patch_size=4, hidden_size=8, depth=2, num_heads=2),
}


def tiny_model(backbone="convnet", dtype=jnp.float32):
    return JointEmbeddingModel(
        backbone=TINY_BACKBONES[backbone].clone(dtype=dtype),
        projector=Projector(hidden_dims=(12, 12), embedding_dim=10, dtype=dtype),
        head=InferenceNetwork(hidden_dim=7, dim=10, dtype=dtype),
    )


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def initialise(module, x):
    variables = jax.jit(lambda key: module.init(key, x, train=False))(jax.random.key(0))
    return jax.tree.map(np.asarray, variables)


@functools.cache
def initial_tiny_variables(backbone):
    return initialise(tiny_model(backbone), jnp.zeros((2, 8, 8, 3)))


def abstract_variables(module, x, train=False):
    return jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=train), x)


def random_variables(module, x) -> Any:
    """Variables without the zeros and ones of the initialisation, which could hide a mistake."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            fan_in = math.prod(leaf.shape[:-1])
            return rng.normal(scale=fan_in**-0.5, size=leaf.shape).astype(np.float32)
        low, high = (0.5, 1.5) if name in ("scale", "var") else (-0.5, 0.5)
        return rng.uniform(low, high, size=leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(module, x))


# The oracle: NumPy, float64, loops.


def relu(x):
    return np.maximum(x, 0)


def softplus(x):
    return np.log1p(np.exp(x))


def conv(x, kernel, stride):
    """Cross-correlation with symmetric zero padding of half the kernel."""
    size, pad = kernel.shape[0], kernel.shape[0] // 2
    x = np.pad(np.float64(x), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    out = np.zeros((x.shape[0], rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * stride : i * stride + size, j * stride : j * stride + size, :]
            out[:, i, j] = np.einsum("nhwc,hwco->no", window, np.float64(kernel))
    return out


def max_pool(x):
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    rows, columns = ((n - 3) // 2 + 1 for n in x.shape[1:3])
    out = np.zeros((x.shape[0], rows, columns, x.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            out[:, i, j] = x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2))
    return out


class Oracle:
    """BatchNorm networks on given variables; keeps the updated running statistics."""

    def __init__(self, variables, train):
        self.params = variables["params"]
        self.stats = variables["batch_stats"]
        self.train = train
        self.new_stats = {}

    def bn(self, x, name):
        axes = tuple(range(x.ndim - 1))
        old, mean, var = self.stats[name], x.mean(axes), x.var(axes)
        self.new_stats[name] = {
            "mean": 0.9 * old["mean"] + 0.1 * mean,
            "var": 0.9 * old["var"] + 0.1 * var,
        }
        if not self.train:
            mean, var = np.float64(old["mean"]), np.float64(old["var"])
        affine = self.params.get(name, {"scale": 1.0, "bias": 0.0})
        return (x - mean) / np.sqrt(var + 1e-5) * affine["scale"] + affine["bias"]

    def conv_bn(self, x, conv_name, bn_name, stride):
        return self.bn(conv(x, self.params[conv_name]["kernel"], stride), bn_name)

    def block(self, x, strides):
        out = x
        for index, stride in enumerate(strides, start=1):
            out = self.conv_bn(out, f"conv{index}", f"bn{index}", stride)
            out = relu(out) if index < len(strides) else out
        if "shortcut_conv" in self.params:
            x = self.conv_bn(x, "shortcut_conv", "shortcut_bn", math.prod(strides))
        return relu(x + out)

    def child(self, name):
        return Oracle({"params": self.params[name], "batch_stats": self.stats[name]}, self.train)


def check_against_oracle(module, x, forward):
    """Compares outputs (both values of `train`) and the updated statistics."""
    variables = random_variables(module, x)
    for train in (False, True):
        oracle = Oracle(variables, train)
        expected = forward(oracle, np.float64(x))
        actual, updates = jax.jit(
            lambda v, x, train=train: module.apply(v, x, train=train, mutable=["batch_stats"])
        )(variables, x)
        assert_close(actual, expected)
        for name, stats in oracle.new_stats.items():
            for moment, value in (stats if train else variables["batch_stats"][name]).items():
                assert_close(updates["batch_stats"][name][moment], value, err_msg=name)


@pytest.mark.parametrize(
    ("bottleneck", "stride", "strides"),
    [
        (False, 1, (1, 1)),
        (False, 2, (2, 1)),
        (True, 1, (1, 1, 1)),
        (True, 2, (1, 2, 1)),
    ],
)
def test_residual_block_matches_oracle(bottleneck, stride, strides):
    features = 3
    channels = 4 * features if bottleneck else features
    module = ResidualBlock(features=features, stride=stride, bottleneck=bottleneck)
    x = normal(1, 3, 6, 5, channels)  # one even and one odd side: paddings differ
    check_against_oracle(module, x, lambda oracle, x: oracle.block(x, strides))
    has_shortcut = "shortcut_conv" in abstract_variables(module, x)["params"]
    assert has_shortcut == (stride == 2)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_resnet_matches_oracle(stem):
    module = ResNet(stage_sizes=(2, 1), bottleneck=True, stem=stem, width=2)
    stem_stride = 1 if stem == "cifar" else 2

    def forward(oracle, x):
        x = relu(oracle.conv_bn(x, "stem_conv", "stem_bn", stem_stride))
        x = max_pool(x) if stem == "imagenet" else x
        for name, strides in (
            ("stage1_block1", (1, 1, 1)),
            ("stage1_block2", (1, 1, 1)),
            ("stage2_block1", (1, 2, 1)),
        ):
            x = oracle.child(name).block(x, strides)
        return x.mean((1, 2))

    # The max-pool sees 6 x 5 pixels: on an even side "SAME" would pad differently.
    check_against_oracle(module, normal(2, 3, 11, 9, 3), forward)


def test_convnet_matches_oracle():
    module = ConvNet(widths=(3, 4), convs_per_stage=2)

    def forward(oracle, x):
        for suffix, stride in (("1_1", 1), ("1_2", 1), ("2_1", 2), ("2_2", 1)):
            x = relu(oracle.conv_bn(x, f"conv{suffix}", f"bn{suffix}", stride))
        return x.mean((1, 2))

    check_against_oracle(module, normal(3, 3, 8, 7, 1), forward)


def test_projector_matches_oracle():
    module = Projector(hidden_dims=(6, 5), embedding_dim=4)

    def forward(oracle, x):
        x = relu(oracle.bn(x @ oracle.params["dense1"]["kernel"], "bn1"))
        x = relu(oracle.bn(x @ oracle.params["dense2"]["kernel"], "bn2"))
        return oracle.bn(x @ oracle.params["dense_out"]["kernel"], "bn_out")

    check_against_oracle(module, normal(4, 9, 7), forward)


def test_inference_network_matches_oracle():
    module = InferenceNetwork(hidden_dim=5, dim=4, min_scale=0.25)

    def forward(oracle, x):
        x = relu(oracle.bn(x @ oracle.params["dense"]["kernel"], "bn"))
        mean, raw = (
            x @ oracle.params[head]["kernel"] + oracle.params[head]["bias"]
            for head in ("mean_head", "raw_scale_head")
        )
        return mean, softplus(raw) + 0.25

    class Stacked(nn.Module):
        """Both outputs as one array, in the order of `Posterior`."""

        def setup(self):
            self.network = module.clone()

        def __call__(self, x, *, train):
            return jnp.stack(self.network(x, train=train)[:2])

    check_against_oracle(
        Stacked(), normal(5, 9, 4), lambda oracle, x: np.stack(forward(oracle.child("network"), x))
    )


def test_projector_without_its_last_batchnorm_matches_oracle():
    module = Projector(hidden_dims=(8,), embedding_dim=5, normalize_output=False)

    def forward(oracle, x):
        x = relu(oracle.bn(x @ oracle.params["dense1"]["kernel"], "bn1"))
        return x @ oracle.params["dense_out"]["kernel"]

    check_against_oracle(module, normal(4, 9, 7), forward)


def test_predictors_match_oracle():
    def hidden(oracle, x):
        return relu(oracle.bn(x @ oracle.params["dense"]["kernel"], "bn"))

    def head(oracle, x, name):
        return x @ oracle.params[name]["kernel"] + oracle.params[name]["bias"]

    check_against_oracle(
        Predictor(hidden_dim=5, dim=4),
        normal(5, 9, 4),
        lambda oracle, x: head(oracle, hidden(oracle, x), "out"),
    )

    class Stacked(nn.Module):
        """Direction and concentration side by side."""

        def setup(self):
            self.network = DirectionalPredictor(hidden_dim=5, dim=4)

        def __call__(self, x, *, train):
            direction, concentration = self.network(x, train=train)
            return jnp.concatenate([direction, concentration[:, None]], axis=1)

    def directional(oracle, x):
        x = hidden(oracle, x)
        concentration = softplus(head(oracle, x, "raw_concentration_head")) + 1e-3
        return np.concatenate([head(oracle, x, "direction_head"), concentration], axis=1)

    check_against_oracle(
        Stacked(), normal(5, 9, 4), lambda oracle, x: directional(oracle.child("network"), x)
    )


def test_isotropic_and_untied_scales():
    x = normal(6, 9, 4)
    module = InferenceNetwork(
        hidden_dim=5, dim=4, min_scale=0.25, isotropic=True, has_likelihood_scale=True
    )
    variables = random_variables(module, x)
    posterior: Any = module.apply(variables, x, train=False)
    assert posterior.posterior_scale.shape == posterior.likelihood_scale.shape == (9, 4)
    oracle = Oracle(variables, False)
    hidden = relu(oracle.bn(x @ oracle.params["dense"]["kernel"], "bn"))
    for name, found in (
        ("raw_scale_head", posterior.posterior_scale),
        ("raw_likelihood_scale_head", posterior.likelihood_scale),
    ):
        assert oracle.params[name]["kernel"].shape == (5, 1)
        raw = hidden @ oracle.params[name]["kernel"] + oracle.params[name]["bias"]
        np.testing.assert_allclose(found, np.repeat(softplus(raw) + 0.25, 4, 1), rtol=1e-5)
    # At the start both scales are the initial one, of every image and feature.
    start: Any = module.apply(module.init(jax.random.key(0), x, train=False), x, train=False)
    np.testing.assert_allclose(start.posterior_scale, 1.0, rtol=1e-6)
    np.testing.assert_allclose(start.likelihood_scale, 1.0, rtol=1e-6)
    tied = InferenceNetwork(hidden_dim=5, dim=4)
    variables = tied.init(jax.random.key(0), x, train=False)
    posterior = tied.apply(variables, x, train=False)
    assert posterior.likelihood_scale is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "module", "output"),
    [
        ("vector", Predictor, jax.Array),
        ("direction", DirectionalPredictor, DirectionalPrediction),
        ("none", None, type(None)),
    ],
)
def test_heads_of_other_methods(head, module, output):
    model = joint.make_model(**arguments(head=head, projector_normalizes_output=False))
    x = normal(0, 2, 8, 8, 3)
    variables: Any = model.init(jax.random.key(0), x, train=True)
    assert set(variables["params"]) == {"backbone", "projector"} | ({"head"} if module else set())
    assert "bn_out" not in variables["batch_stats"]["projector"]
    outputs: Any = model.apply(variables, x, train=False)
    assert isinstance(outputs.prediction, output)
    if module is not None:
        assert model.head == module(hidden_dim=8, dim=12)


def test_vit_matches_oracle():
    size, heads, patch = 8, 2, 2
    module = ViT(patch_size=patch, hidden_size=size, depth=2, num_heads=heads)
    images = normal(6, 2, 4, 6, 3)
    params = random_variables(module, images)["params"]

    def layer_norm(x, p):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * p["scale"] + p.get("bias", 0.0)

    def dense(x, p):
        return x @ np.float64(p["kernel"]) + p.get("bias", 0.0)

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attention(x, p):
        out = np.zeros_like(x)
        query, key, value = (dense(x, p[name]) for name in ("query", "key", "value"))
        for head in range(heads):
            part = slice(head * size // heads, (head + 1) * size // heads)
            logits = query[:, part] @ key[:, part].T / math.sqrt(size / heads)
            weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            out[:, part] = weights @ value[:, part]
        return dense(out, p["attention_out"])

    expected = []
    for image in images.astype(np.float64):
        tokens = []
        for i in range(2):
            for j in range(3):
                window = image[patch * i : patch * (i + 1), patch * j : patch * (j + 1)]
                angles = [j, j / 100, i, i / 100]  # 10000 ** (-1 / 2) = 1 / 100
                position = [f(a) for a in (angles[:2], angles[2:]) for f in (np.sin, np.cos)]
                token = dense(window.reshape(-1), params["patch_embedding"])
                tokens.append(token + np.concatenate(position))
        x = np.stack(tokens)
        for name in ("block1", "block2"):
            p = params[name]
            x = x + attention(layer_norm(x, p["attention_norm"]), p)
            hidden = gelu(dense(layer_norm(x, p["mlp_norm"]), p["mlp_in"]))
            x = x + dense(hidden, p["mlp_out"])
        expected.append(layer_norm(x, params["final_norm"]).mean(0))

    for train in (False, True):
        apply = jax.jit(functools.partial(module.apply, train=train))
        assert_close(apply({"params": params}, images), np.stack(expected))


def test_sincos_position_embedding_matches_its_formula():
    rows, columns, dim = 3, 5, 12
    table = sincos_position_embedding(rows, columns, dim=dim)
    assert table.shape == (rows * columns, dim)
    assert table.dtype == np.float32
    for i in range(rows):
        for j in range(columns):
            frequencies = [10_000.0 ** (-k / 3) for k in range(3)]
            expected = [f(a * w) for a in (j, i) for f in (math.sin, math.cos) for w in frequencies]
            np.testing.assert_allclose(table[i * columns + j], expected, atol=1e-7)


def test_vit_takes_images_of_any_size_with_the_same_parameters():
    module = TINY_BACKBONES["vit"]
    square, wide = (
        abstract_variables(module, jnp.zeros((1, *size, 3))) for size in ((8, 8), (4, 12))
    )
    assert square == wide


# Sizes


def count(module, size):
    variables = abstract_variables(module, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    return joint.parameter_count(variables["params"])


@pytest.mark.parametrize(
    ("build", "stem", "expected"),
    [
        # torchvision's totals less the classifier (512 * 1000 + 1000, or 2048 * 1000 + 1000).
        (resnet18, "imagenet", 11_689_512 - 513_000),
        (resnet34, "imagenet", 21_797_672 - 513_000),
        (resnet50, "imagenet", 25_557_032 - 2_049_000),
        # The 3x3 stem replaces the 7x7 one.
        (resnet18, "cifar", 11_176_512 - 7 * 7 * 3 * 64 + 3 * 3 * 3 * 64),
        (resnet50, "cifar", 23_508_032 - 7 * 7 * 3 * 64 + 3 * 3 * 3 * 64),
    ],
)
def test_resnet_parameter_counts(build, stem, expected):
    assert count(build(stem=stem), 32) == expected


@pytest.mark.parametrize(
    ("build", "dim", "deit_total"),
    [(vit_tiny, 192, 5_524_416), (vit_small, 384, 21_665_664)],
)
def test_vit_parameter_counts(build, dim, deit_total):
    patch_embedding = 16 * 16 * 3 * dim + dim
    attention = 4 * dim * dim + 3 * dim  # query, value and output have a bias, key has none
    mlp = 2 * 4 * dim * dim + 4 * dim + dim
    norms = 2 * 2 * dim
    expected = patch_embedding + 12 * (attention + mlp + norms) + dim
    assert count(build(patch_size=16), 224) == expected
    # DeiT adds a class token, 197 learned positions, 12 key biases and the last LayerNorm's bias.
    assert expected + dim + 197 * dim + 12 * dim + dim == deit_total


def test_simsiam_projector_parameter_count():
    # SimSiam's projector on ResNet-50: three 2048 x 2048 matrices, two affine BatchNorms.
    variables = abstract_variables(Projector(), jax.ShapeDtypeStruct((1, 2048), jnp.float32))
    assert joint.parameter_count(variables["params"]) == 3 * 2048**2 + 2 * 2 * 2048


def arguments(**changes):
    """Arguments of `make_model`, small."""
    return {
        "backbone": "convnet",
        "width": 0,
        "stem": "cifar",
        "patch_size": 4,
        "projector_hidden_dims": (16, 16),
        "embedding_dim": 12,
        "projector_normalizes_output": True,
        "head": "posterior",
        "head_input": "direction",
        "head_hidden_dim": 8,
        "initial_scale": 0.7,
        "min_scale": 0.01,
        "isotropic": False,
        "has_likelihood_scale": False,
        "initial_radial_scale": 0.3,
        "dtype": "float32",
        "zero_init_residual": False,
        "batch_norm": "fused",
        **changes,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "width", "features"),
    [
        ("resnet8", 16, 64),
        ("resnet18", 0, 512),
        ("resnet34", 16, 128),
        ("resnet50", 0, 2048),
        ("convnet", 0, 128),
        ("convnet", 12, 48),
        ("vit_tiny", 0, 192),
        ("vit_small", 48, 48),
        ("timm_vit_tiny", 12, 12),
        ("dinov2_small_registers", 0, 384),
    ],
)
def test_make_model_shapes_and_types(backbone, width, features):
    model = joint.make_model(**arguments(backbone=backbone, width=width, dtype="bfloat16"))
    images = jax.ShapeDtypeStruct((5, 32, 32, 3), jnp.float32)
    variables = abstract_variables(model, images, train=True)
    assert set(variables) <= {"params", "batch_stats"}
    assert set(variables["params"]) == {
        "backbone",
        "projector",
        "head",
        "raw_radial_scale",
    }
    outputs, updates = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]), variables, images
    )
    assert outputs.representation.shape == (5, features)
    assert {x.shape for x in jax.tree.leaves(outputs[1:])} == {(5, 12)}
    assert jax.tree.structure(updates["batch_stats"]) == jax.tree.structure(
        variables["batch_stats"]
    )
    for leaf in jax.tree.leaves((variables, outputs, updates)):
        assert leaf.dtype == jnp.float32


@pytest.mark.parametrize("head", ["posterior", "direction"])
@pytest.mark.parametrize("head_input", HEAD_INPUTS)
def test_a_head_that_sees_the_direction_says_the_same_of_every_radius(head, head_input):
    model = joint.make_model(**arguments(head=head, head_input=head_input))
    variables: Any = random_variables(model, jnp.zeros((2, 8, 8, 1)))
    embedding = normal(0, 5, 12)

    def prediction(embedding):
        bound: Any = model.bind(variables)
        features = head_features(embedding, model.head_input)
        return jax.tree.leaves(bound.head(features, train=False))

    near, far = prediction(embedding), prediction(1e3 * embedding)
    equal = [np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(near, far, strict=True)]
    assert all(equal) if head_input == "direction" else not any(equal)


@pytest.mark.slow
def test_head_features_against_numpy_and_at_the_edges():
    h = np.random.default_rng(0).normal(size=(4, 9)) * np.array([[1e-20], [1.0], [3.0], [1e20]])
    radius = np.linalg.norm(h, axis=1, keepdims=True)
    features = head_features(jnp.asarray(h, jnp.float32), "direction_and_radius")
    expected = [3 * h / radius, 3 * (radius**2 - 9) / (radius**2 + 9)]
    np.testing.assert_allclose(features, np.concatenate(expected, axis=1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(head_features(jnp.asarray(h), "embedding"), jnp.asarray(h))

    def total(x):
        return jnp.sum(head_features(x, "direction_and_radius"))

    assert np.all(np.isfinite(jax.grad(total)(jnp.zeros((2, 9)))))
    with pytest.raises(ValueError, match="head_input must be one of"):
        head_features(jnp.asarray(h), "radius")  # pyright: ignore[reportArgumentType]


def test_heads_that_predict_a_vector_see_the_embedding():
    assert joint.make_model(**arguments(head="vector")).head_input == "embedding"


def test_make_model_passes_its_arguments_on():
    model = joint.make_model(**arguments(width=4, dtype="bfloat16"))
    assert model.backbone == ConvNet(widths=(4, 8, 16), dtype=jnp.bfloat16)
    assert model.projector == Projector(hidden_dims=(16, 16), embedding_dim=12, dtype=jnp.bfloat16)
    assert model.head == InferenceNetwork(
        hidden_dim=8, dim=12, initial_scale=0.7, min_scale=0.01, dtype=jnp.bfloat16
    )
    assert model.initial_radial_scale == 0.3

    resnet = joint.make_model(**arguments(backbone="resnet34", stem="imagenet")).backbone
    assert resnet == resnet34(stem="imagenet")
    vit = joint.make_model(**arguments(backbone="vit_small", patch_size=8)).backbone
    assert vit == vit_small(patch_size=8)
    dinov2 = joint.make_model(**arguments(backbone="dinov2_small", pool="mean")).backbone
    assert dinov2 == dinov2_small(patch_size=4, pool="mean")
    base = joint.make_model(**arguments(backbone="dinov2_small", width=768)).backbone
    assert base == dinov2_small(patch_size=4, hidden_size=768, num_heads=12)


def test_resnet18_and_its_gradients_are_those_of_the_installed_torchvision():
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18()
    theirs.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = theirs.fc = torch.nn.Identity()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    ours = resnet18(stem="cifar")
    images, weights = normal(20, 8, 16, 16, 3), normal(21, 8, 512)
    out = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    (out * torch.from_numpy(weights)).sum().backward()

    parameters = dict(theirs.named_parameters())

    def of_torch(path: Any, leaf: Any, *, gradient: bool) -> np.ndarray:
        found = parameters[torch_name(".".join(["params", *(key.key for key in path)]))]
        values = (found.grad if gradient else found).detach().numpy()
        values = values.transpose(2, 3, 1, 0) if values.ndim == 4 else values
        assert values.shape == leaf.shape
        return values

    variables: Any = abstract_variables(ours, images)
    params, expected = (
        jax.tree_util.tree_map_with_path(
            functools.partial(of_torch, gradient=gradient), variables["params"]
        )
        for gradient in (False, True)
    )
    assert len(parameters) == len(jax.tree.leaves(params))
    statistics = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), variables)

    def loss(params: Any) -> Any:
        state = {"params": params, "batch_stats": statistics["batch_stats"]}
        found, _ = ours.apply(state, images, train=True, mutable=["batch_stats"])
        return jnp.sum(found * weights), found

    gradients, found = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(found, out.detach().numpy(), rtol=1e-4, atol=1e-4)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        theirs_gradient = functools.reduce(lambda tree, key: tree[key.key], path, expected)
        # A ReLU at zero falls either way, with a whole example's gradient there.
        error = np.linalg.norm(gradient - theirs_gradient) / np.linalg.norm(theirs_gradient)
        assert error < 5e-3, jax.tree_util.keystr(path)


# Initialisation


@pytest.mark.parametrize(("bottleneck", "stride"), [(False, 1), (True, 2)])
def test_block_starts_as_its_shortcut_with_zero_init_residual(bottleneck, stride):
    features = 4
    channels = 4 * features if bottleneck else features
    module = ResidualBlock(
        features=features, stride=stride, bottleneck=bottleneck, zero_init_residual=True
    )
    x = normal(7, 2, 4, 4, channels)
    variables = initialise(module, x)
    out = jax.jit(functools.partial(module.apply, train=False))(variables, x)
    if stride == 1:
        expected = relu(x)
    else:
        expected = relu(Oracle(variables, False).conv_bn(x, "shortcut_conv", "shortcut_bn", 2))
    assert_close(out, expected)


@pytest.mark.parametrize("zero_init_residual", [nightly(None), False, True])
def test_scales_of_batch_norms_start_at_one_but_where_asked(zero_init_residual):
    options = {} if zero_init_residual is None else {"zero_init_residual": zero_init_residual}
    config: Any = cifar10.get_config("jevb")
    config.model.update(backbone="resnet8", width=4, embedding_dim=4, **options)
    config.model.update(projector_hidden_dims=(4,), head_hidden_dim=4)
    model = from_settings.make_network(read.saved_settings(config.to_dict()))
    params = initialise(model, jnp.zeros((2, 8, 8, 3)))["params"]["backbone"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            is_zero = bool(zero_init_residual) and "bn2" in name
            np.testing.assert_array_equal(leaf, 0 if is_zero else 1, err_msg=name)


@pytest.mark.slow
def test_initial_kernels_have_the_published_spread():
    resnet = ResNet(stage_sizes=(1, 1), bottleneck=False, stem="imagenet", width=64)
    params = initialise(resnet, jnp.zeros((1, 8, 8, 3)))["params"]
    projector = Projector(hidden_dims=(128,), embedding_dim=256)
    projector_params = initialise(projector, jnp.zeros((2, 512)))["params"]
    he = {
        # torchvision's kaiming_normal_(mode="fan_out"): variance 2 / (out * kernel area)
        "stem": (params["stem_conv"]["kernel"], 2 / (64 * 49)),
        "3x3": (params["stage2_block1"]["conv1"]["kernel"], 2 / (128 * 9)),
        "1x1": (params["stage2_block1"]["shortcut_conv"]["kernel"], 2 / 128),
        # fan_in
        "hidden": (projector_params["dense1"]["kernel"], 2 / 512),
        "out": (projector_params["dense_out"]["kernel"], 2 / 128),
    }
    for name, (kernel, variance) in he.items():
        # A sample variance of n normals has relative standard error sqrt(2 / n).
        error = 5 * math.sqrt(2 / kernel.size)
        np.testing.assert_allclose(np.var(kernel), variance, rtol=error, err_msg=name)

    vit = ViT(patch_size=4, hidden_size=64, depth=1, num_heads=2)
    params = initialise(vit, jnp.zeros((1, 8, 8, 3)))["params"]
    xavier = {
        "patch_embedding": (params["patch_embedding"]["kernel"], 48, 64),
        "query": (params["block1"]["query"]["kernel"], 64, 64),
        "mlp_in": (params["block1"]["mlp_in"]["kernel"], 64, 256),
    }
    for name, (kernel, fan_in, fan_out) in xavier.items():
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.99 * bound < np.abs(kernel).max() <= bound, name


@pytest.mark.parametrize(
    ("initial_scale", "min_scale"), [(1.0, 1e-3), (1.1e-3, 1e-3), (0.05, 0.0), (80.0, 0.5)]
)
def test_posterior_scale_starts_at_initial_scale(initial_scale, min_scale):
    module = InferenceNetwork(hidden_dim=4, dim=3, initial_scale=initial_scale, min_scale=min_scale)
    embedding = normal(8, 16, 3) * np.float32(1e3)
    variables = initialise(module, embedding)
    for train in (False, True):
        posterior, _ = module.apply(variables, embedding, train=train, mutable=["batch_stats"])
        # A few float32 roundings of raw_scale, of magnitude at most 9.3 here.
        np.testing.assert_allclose(posterior.posterior_scale, initial_scale, rtol=2e-6)
        assert np.std(posterior.posterior_mean) > 0


@pytest.mark.slow
def test_radial_scale_needs_no_image_and_starts_at_its_value():
    model = tiny_model()
    params = initial_tiny_variables("convnet")["params"]
    assert params["raw_radial_scale"].shape == ()

    def radial_scale(raw) -> Any:
        return model.apply({"params": {**params, "raw_radial_scale": raw}}, method="radial_scale")

    np.testing.assert_allclose(radial_scale(params["raw_radial_scale"]), 0.5, rtol=1e-6)
    np.testing.assert_allclose(radial_scale(jnp.float32(-40.0)), 1e-3, rtol=1e-6)
    np.testing.assert_allclose(radial_scale(jnp.float32(2.0)), softplus(2.0) + 1e-3, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(radial_scale)(0.0), 0.5, rtol=1e-6)


# The whole model


def test_model_chains_its_parts_and_does_not_normalise():
    model = tiny_model()
    images = normal(9, 6, 8, 8, 3)
    variables = random_variables(model, images)

    @jax.jit
    def whole_and_parts(variables):
        def apply(name, x):
            part = {kind: tree[name] for kind, tree in variables.items() if name in tree}
            return getattr(model, name).apply(part, x, train=False)

        representation = apply("backbone", images)
        embedding = apply("projector", representation)
        posterior = apply("head", embedding)
        return model.apply(variables, images, train=False), (representation, embedding, posterior)

    outputs, expected = whole_and_parts(variables)
    for actual, part in zip(jax.tree.leaves(outputs), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, part, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backbone", TINY_BACKBONES)
def test_running_statistics_isolate_each_image(backbone):
    model = tiny_model(backbone)
    images = normal(10, 4, 8, 8, 3)
    variables = random_variables(model, images)
    apply = jax.jit(lambda images: model.apply(variables, images, train=False))
    poisoned = images.copy()
    poisoned[1:] = np.nan
    clean_leaves, poisoned_leaves = (jax.tree.leaves(apply(x)) for x in (images, poisoned))
    for clean, beside_nan in zip(clean_leaves, poisoned_leaves, strict=True):
        np.testing.assert_allclose(clean[0], beside_nan[0], rtol=1e-6, atol=1e-6)
        assert np.isnan(beside_nan[1:]).all()


@pytest.mark.parametrize(
    "backbone",
    [nightly(name) if name in ("resnet", "vit") else name for name in TINY_BACKBONES],
)
def test_no_parameter_is_dead(backbone):
    """Every leaf gets a gradient through the posterior: targets are under stop-gradient."""
    model = tiny_model(backbone)
    images = normal(11, 16, 8, 8, 3)
    variables = initial_tiny_variables(backbone)
    weights = [normal(seed, 16, 10) for seed in range(2)]

    @jax.jit
    def gradient(params, batch_stats):
        def loss(params):
            outputs, _ = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            scale: Any = model.apply({"params": params}, method="radial_scale")
            terms = [jnp.sum(w * x) for w, x in zip(weights, outputs.prediction[:2], strict=True)]
            return sum(terms) + scale

        return jax.grad(loss)(params)

    # The zero kernel of the scale head holds back other gradients for a step.
    params = variables["params"]
    for _ in range(2):
        grads = gradient(params, variables["batch_stats"])
        params = jax.tree.map(lambda p, g: p - 0.02 * g, params, grads)
    grads = gradient(params, variables["batch_stats"])
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(grad).all(), name
        # Rounding alone gives about 1e-6 where the gradient is zero in exact arithmetic.
        assert np.abs(grad).max() > 1e-3, name


@pytest.mark.parametrize("part", [*TINY_BACKBONES, "projector", "head"])
def test_bfloat16_stays_close_to_float32(part):
    # Part by part: in the chain, the projector's BatchNorm subtracts the mean of the
    # representation and so magnifies its relative error by mean over standard deviation.
    heads = {name: getattr(tiny_model(), name) for name in ("projector", "head")}
    module = {**TINY_BACKBONES, **heads}[part]
    x = normal(12, 16, 10) if part in heads else normal(12, 16, 8, 8, 3)
    variables = random_variables(module, x)
    (full, _), (low, _) = (
        jax.jit(functools.partial(m.apply, train=True, mutable=["batch_stats"]))(variables, x)
        for m in (module, module.clone(dtype=jnp.bfloat16))
    )
    for expected, actual in zip(jax.tree.leaves(full), jax.tree.leaves(low), strict=True):
        # One rounding to bfloat16 is at most 2**-9 = 0.2%: ten of the same sign.
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert 1e-5 < error < 0.02
        # The outputs themselves have float32 precision.
        rounded = actual.astype(jnp.bfloat16).astype(jnp.float32)
        assert np.mean(np.asarray(actual != rounded)) > 0.5


@pytest.mark.parametrize("backbone", TINY_BACKBONES)
def test_bfloat16_multiplies_in_bfloat16_except_in_the_heads(backbone):
    model = tiny_model(backbone, jnp.bfloat16)
    images = jnp.zeros((4, 8, 8, 3))
    apply = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    text = apply.lower(abstract_variables(model, images), images).as_text()
    products = re.findall(r"stablehlo\.(?:convolution|dot_general).*: \((.*)\) ->", text)
    assert len(products) > 6
    low = [operands.count("bf16") == 2 for operands in products]
    assert low.count(False) == 2  # posterior mean and raw scale


# BatchNorm


def test_projector_output_has_unit_variance_and_no_affine():
    module = Projector(hidden_dims=(16,), embedding_dim=8)
    x = normal(14, 64, 12)
    variables = initialise(module, x)
    assert set(variables["params"]) == {"dense1", "bn1", "dense_out"}
    assert set(variables["params"]["dense_out"]) == {"kernel"}
    assert "bn_out" in variables["batch_stats"]
    embedding, _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(np.mean(embedding, 0), 0, atol=1e-6)
    np.testing.assert_allclose(np.var(embedding, 0), 1, rtol=1e-4)  # var / (var + epsilon)


def test_projector_variance_survives_a_nearly_constant_input():
    # Mean 100, standard deviation 0.1: E[x^2] - E[x]^2 in float32 is off by several percent.
    module = Projector(hidden_dims=(), embedding_dim=4)
    x = 100 + np.float32(0.1) * normal(15, 256, 4)
    variables = initialise(module, x)
    variables = {**variables, "params": {"dense_out": {"kernel": jnp.eye(4)}}}
    embedding, _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
    var = np.var(np.float64(x), 0)
    np.testing.assert_allclose(np.var(embedding, 0), var / (var + 1e-5), rtol=1e-4)


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet19"}, r"resnet18.*convnet.*vit_small.*'resnet19'"),
        ({"head": "classifier"}, r"posterior.*'classifier'"),
        ({"dtype": "float16"}, r"float32.*bfloat16.*'float16'"),
        ({"width": -1}, "width"),
        ({"backbone": "resnet18", "stem": "tiny"}, r"cifar.*imagenet.*'tiny'"),
        ({"backbone": "vit_tiny", "patch_size": 0}, "patch_size"),
        ({"backbone": "vit_tiny", "width": 50}, "hidden_size"),
        ({"backbone": "vit_tiny", "width": 6}, "hidden_size"),
        ({"backbone": "timm_vit_tiny", "width": 200}, "hidden_size"),
        ({"backbone": "dinov2_small", "pool": "max"}, "pool must be one of"),
        ({"projector_hidden_dims": (8, 0)}, "hidden_dims"),
        ({"embedding_dim": 0}, "embedding_dim"),
        ({"head_hidden_dim": 0}, "hidden_dim"),
        ({"initial_scale": 0.01}, "initial_scale"),
        ({"initial_scale": math.inf}, "initial_scale"),
        ({"initial_scale": math.nan}, "initial_scale"),
        ({"min_scale": -1.0}, "initial_scale"),
        ({"initial_radial_scale": 1e-3}, "initial_radial_scale"),
        ({"batch_norm": "fast"}, 'must be "fused" or "plain"'),
    ],
)
def test_make_model_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        joint.make_model(**arguments(**changes))


@pytest.mark.parametrize("sizes", [(), (8, 0)])
def test_backbones_refuse_empty_and_zero_sizes(sizes):
    with pytest.raises(ValueError, match="widths must be"):
        ConvNet(widths=sizes)
    with pytest.raises(ValueError, match="stage_sizes must be"):
        ResNet(stage_sizes=sizes, bottleneck=False, stem="cifar")


@pytest.mark.parametrize("backbone", TINY_BACKBONES.values(), ids=TINY_BACKBONES)
def test_backbones_refuse_other_images(backbone):
    with pytest.raises(ValueError, match=r"\[batch, height, width, channels\]"):
        backbone.init(jax.random.key(0), jnp.zeros((8, 8, 3)), train=False)
    with pytest.raises(TypeError, match="uint8"):
        backbone.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8), train=False)


@pytest.mark.parametrize("shape", [(8, 10), (10, 8)])
def test_vit_refuses_sides_that_patches_do_not_tile(shape):
    with pytest.raises(ValueError, match=rf"patch_size = 4.*{shape[0]}x{shape[1]}"):
        TINY_BACKBONES["vit"].init(jax.random.key(0), jnp.zeros((1, *shape, 3)), train=False)


@pytest.mark.parametrize(
    "module",
    [
        Projector(hidden_dims=(4,), embedding_dim=4),
        InferenceNetwork(hidden_dim=4, dim=4),
        Predictor(hidden_dim=4, dim=4),
        DirectionalPredictor(hidden_dim=4, dim=4),
    ],
    ids=["projector", "posterior", "vector", "direction"],
)
def test_heads_refuse_one_training_example_and_other_ranks(module):
    one = jnp.ones((1, 4))
    variables = module.init(jax.random.key(0), one, train=True)  # a dummy batch may be of one
    module.apply(variables, one, train=False)
    with pytest.raises(ValueError, match="at least 2 examples"):
        module.apply(variables, one, train=True, mutable=["batch_stats"])
    with pytest.raises(ValueError, match=r"\[batch, features\]"):
        module.apply(variables, jnp.ones((2, 2, 4)), train=False)


def scalar_of_training(model, images):
    """A function of parameters: a weighted sum of all that a training pass returns."""
    variables = random_variables(model, images)
    apply: Any = model.apply

    def outputs(params):
        return apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])

    shapes = jax.tree.leaves(jax.eval_shape(outputs, variables["params"]))
    weights = [normal(index, *leaf.shape) for index, leaf in enumerate(shapes)]

    def scalar(params):
        leaves = jax.tree.leaves(outputs(params))
        return sum(jnp.vdot(w, leaf) for w, leaf in zip(weights, leaves, strict=True))

    return scalar, variables["params"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "width", "head"),
    [
        ("resnet8", 4, "posterior"),
        pytest.param("resnet18", 4, "vector", marks=pytest.mark.nightly),
        pytest.param("convnet", 4, "direction", marks=pytest.mark.nightly),
        pytest.param("vit_tiny", 12, "none", marks=pytest.mark.nightly),
    ],
)
def test_forward_mode_of_every_network_agrees_with_reverse_mode(backbone, width, head):
    options = arguments(backbone=backbone, width=width, head=head)
    plain, fused = (
        joint.make_model(**{**options, "batch_norm": kind}) for kind in ("plain", "fused")
    )
    images = normal(0, 4, 16, 16, 3)
    forward, params = scalar_of_training(plain, images)
    reverse, same_params = scalar_of_training(fused, images)
    jax.tree.map(np.testing.assert_array_equal, params, same_params)
    rng = np.random.default_rng(5)
    directions = [
        jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
        for _ in range(2)
    ]

    def along(steps):
        return forward(
            jax.tree.map(lambda p, u, v: p + steps[0] * u + steps[1] * v, params, *directions)
        )

    @jax.jit
    def derivatives():
        tangent = jax.jvp(forward, (params,), (directions[0],))[1]
        return jax.jacfwd(along)(jnp.zeros(2)), tangent, jax.grad(reverse)(params)

    found, tangent, gradient = derivatives()
    expected = [
        sum(np.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient, u)), strict=True))
        for u in directions
    ]
    norm, *lengths = (
        np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))
        for tree in (gradient, *directions)
    )
    # Between random directions the cosine is some 1 / sqrt(parameters), 0.005 and more here.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * norm * max(lengths))
    np.testing.assert_allclose(tangent, found[0], rtol=0, atol=1e-5 * norm * lengths[0])


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet", "convnet"])
def test_forward_mode_through_fused_batch_norm_says_what_to_set(backbone):
    module, images = TINY_BACKBONES[backbone], normal(0, 2, 8, 8, 3)
    variables = random_variables(module, images)
    for train in (False, True):

        def output(images, train=train):
            return module.apply(variables, images, train=train, mutable=["batch_stats"])[0]

        if train:
            with pytest.raises(TypeError, match=r'model\.batch_norm = "plain".*fused_batch_norm'):
                jax.jvp(output, (images,), (images,))
        else:
            jax.jvp(output, (images,), (images,))
