"""Vision transformers with timm's names: against NumPy by timm's rules, and against timm itself."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jevb_jax.networks import class_token_vit, joint, torch_names, vit_names
from jevb_jax.networks.class_token_vit import ClassTokenViT
from tests.marks import nightly

PATCH, WIDTH, DEPTH, HEADS, CHANNELS = 2, 8, 2, 2, 3
KINDS: dict[str, dict[str, Any]] = {
    "timm": {},
    "dinov2": {"layer_scale": True},
    "registers": {"layer_scale": True, "num_registers": 3},
}


def network(**options: Any) -> ClassTokenViT:
    return ClassTokenViT(
        patch_size=PATCH, hidden_size=WIDTH, depth=DEPTH, num_heads=HEADS, **options
    )


def timm_shapes(
    *,
    width: int = WIDTH,
    depth: int = DEPTH,
    patch: int = PATCH,
    num_patches: int = 9,
    layer_scale: bool = False,
    num_registers: int = 0,
) -> dict[str, tuple[int, ...]]:
    """What timm's `VisionTransformer` holds, by its own rules, with a classifier of 5 classes."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "patch_embed.proj.weight": (width, CHANNELS, patch, patch),
        "patch_embed.proj.bias": (width,),
        "pos_embed": (1, num_patches + (0 if num_registers else 1), width),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (5, width),
        "head.bias": (5,),
    }
    if num_registers:
        shapes["reg_token"] = (1, num_registers, width)
    for block in range(depth):
        for name, out, of in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes[f"blocks.{block}.{name}.weight"] = (out, of)
            shapes[f"blocks.{block}.{name}.bias"] = (out,)
        for name in ("norm1", "norm2"):
            shapes[f"blocks.{block}.{name}.weight"] = (width,)
            shapes[f"blocks.{block}.{name}.bias"] = (width,)
        if layer_scale:
            shapes[f"blocks.{block}.ls1.gamma"] = (width,)
            shapes[f"blocks.{block}.ls2.gamma"] = (width,)
    return shapes


def random_arrays(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(loc=float("norm" in name), scale=0.4, size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def shapes_of(module: Any, *size: int) -> Any:
    images = jnp.zeros((1, *size, CHANNELS))
    return jax.eval_shape(lambda: module.init(jax.random.key(0), images, train=False))


def torch_resample(values: np.ndarray, new: int) -> np.ndarray:
    """The first axis by the loops of torch's antialiased bicubic kernel on the CPU."""
    old = len(values)
    scale = old / new
    support = 2.0 * max(scale, 1.0)
    inverse = 1.0 / max(scale, 1.0)
    out = []
    for index in range(new):
        center = scale * (index + 0.5)
        first = max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), old)
        weights = []
        for place in range(first, last):
            x = abs((place - center + 0.5) * inverse)
            if x < 1:
                weights.append(((-0.5 + 2) * x - (-0.5 + 3)) * x * x + 1)
            elif x < 2:
                weights.append((((x - 5) * x + 8) * x - 4) * -0.5)
            else:
                weights.append(0.0)
        mixed = sum(w * values[first + k] for k, w in enumerate(weights)) / sum(weights)
        out.append(mixed)
    return np.stack(out)


def timm_forward(arrays: dict[str, np.ndarray], image: np.ndarray, pool: str) -> np.ndarray:
    """One image `[h, w, c]` through timm's `forward_features` and pooling, in float64."""
    p = {name: array.astype(np.float64) for name, array in arrays.items()}

    def layer_norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def attention(x: np.ndarray, name: str) -> np.ndarray:
        # timm: reshape(B, N, 3, heads, head_dim)
        qkv = linear(x, f"{name}.qkv").reshape(len(x), 3, HEADS, WIDTH // HEADS)
        heads = []
        for head in range(HEADS):
            query, key, value = (qkv[:, part, head] for part in range(3))
            logits = query @ key.T * (WIDTH // HEADS) ** -0.5
            weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            heads.append(weights @ value)
        return linear(np.concatenate(heads, axis=1), f"{name}.proj")

    gelu = np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))
    rows, columns = image.shape[0] // PATCH, image.shape[1] // PATCH
    tokens = []
    for i in range(rows):
        for j in range(columns):
            window = image[PATCH * i : PATCH * (i + 1), PATCH * j : PATCH * (j + 1)]
            token = np.einsum("hwc,ochw->o", window, p["patch_embed.proj.weight"])
            tokens.append(token + p["patch_embed.proj.bias"])
    x = np.stack(tokens)
    positions, has_registers = p["pos_embed"][0], "reg_token" in p
    first = 0 if has_registers else 1
    side = math.isqrt(len(positions) - first)
    grid = positions[first:].reshape(side, side, WIDTH)
    if (side, side) != (rows, columns):
        grid = torch_resample(grid, rows)
        grid = torch_resample(grid.swapaxes(0, 1), columns).swapaxes(0, 1)
    grid = grid.reshape(-1, WIDTH)
    if has_registers:
        x = np.concatenate([p["cls_token"][0], p["reg_token"][0], x + grid])
    else:
        x = np.concatenate([p["cls_token"][0], x]) + np.concatenate([positions[:1], grid])
    for block in range(DEPTH):
        name = f"blocks.{block}"
        scales = [p.get(f"{name}.ls{n}.gamma", 1.0) for n in (1, 2)]
        x = x + scales[0] * attention(layer_norm(x, f"{name}.norm1"), f"{name}.attn")
        hidden = gelu(linear(layer_norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        x = x + scales[1] * linear(hidden, f"{name}.mlp.fc2")
    x = layer_norm(x, "norm")
    num_first = 1 + (p["reg_token"].shape[1] if has_registers else 0)
    return x[0] if pool == "class" else x[num_first:].mean(0)


@pytest.mark.parametrize(
    ("kind", "pool", "size_of_tokens"),
    [
        ("timm", "class", 1.0),
        nightly("dinov2", "mean", 1.0),
        ("registers", "class", 0.01),  # the epsilon of every norm counts
        ("registers", "mean", 1.0),
    ],
)
def test_outputs_are_those_of_timm_s_rules(kind, pool, size_of_tokens):
    arrays = random_arrays(timm_shapes(**KINDS[kind]))
    for name in arrays:
        if re.search(r"token|pos_embed|patch_embed|attn\.proj|fc2", name):  # what tokens consist of
            arrays[name] *= size_of_tokens
    module = network(**KINDS[kind], pool=pool)
    # Weights of a grid of 3x3 patches in a network of 3x3, and resampled into one of 4x4.
    for own in (6, 8):
        variables = torch_names.from_torch(arrays, shapes_of(module, own, own))
        apply = jax.jit(functools.partial(module.apply, train=True))
        # Twice resampled positions are not those of the file: only the size of the network itself.
        for size in ((6, 6), (4, 8)) if own == 6 else ((8, 8),):
            images = np.random.default_rng(1).normal(size=(2, *size, CHANNELS)).astype(np.float32)
            expected = [timm_forward(arrays, image.astype(np.float64), pool) for image in images]
            np.testing.assert_allclose(apply(variables, images), expected, rtol=2e-5, atol=2e-5)


def test_a_resampled_row_is_torch_s():
    rng = np.random.default_rng(0)
    for old, new in ((1, 1), (1, 5), (5, 1), (7, 7), (14, 6), (6, 14), (37, 16), (16, 37), (37, 7)):
        weights = class_token_vit.resample_matrix(old, new)
        values = rng.normal(size=(old, 2))
        np.testing.assert_allclose(weights @ values, torch_resample(values, new), atol=1e-12)
    np.testing.assert_array_equal(class_token_vit.resample_matrix(7, 7), np.eye(7))
    with pytest.raises(ValueError, match="new must be at least 1"):
        class_token_vit.resample_matrix(3, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_array_of_timm_goes_in_and_comes_out(kind):
    arrays = random_arrays(timm_shapes(**KINDS[kind]))
    wanted = {"batch_stats": {}, **shapes_of(network(**KINDS[kind]), 6, 6)}
    variables = torch_names.from_torch(arrays, wanted)
    assert jax.tree.structure(variables) == jax.tree.structure(wanted)
    assert not vit_names.remark(arrays, wanted)
    back = torch_names.to_torch(variables)
    assert set(back) == set(arrays) - {"head.weight", "head.bias"}
    for name, array in back.items():
        np.testing.assert_array_equal(array, arrays[name])
        assert array.flags.c_contiguous
    # One patch: rows, columns and channels, in this order. The third column of the second row.
    params = variables["params"]
    assert (
        params["patch_embedding"]["kernel"][0, 1, 2, 5]
        == arrays["patch_embed.proj.weight"][5, 2, 0, 1]
    )
    assert params["positions"][1, 2, 4] == arrays["pos_embed"][0, -9 + 5, 4]
    half = arrays["patch_embed.proj.bias"].astype(np.float16)
    found = torch_names.from_torch({**arrays, "patch_embed.proj.bias": half}, wanted)
    np.testing.assert_array_equal(found["params"]["patch_embedding"]["bias"], np.float32(half))


def test_files_of_dinov2_s_own_code():
    plain = random_arrays(timm_shapes(layer_scale=True))
    wanted = shapes_of(network(layer_scale=True), 6, 6)
    mask = np.ones((1, WIDTH), np.float32)
    expected = torch_names.from_torch(plain, wanted)
    found = torch_names.from_torch({**plain, "mask_token": mask}, wanted)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    # With registers, their class token has a position, which timm adds to the token.
    of_timm = random_arrays(timm_shapes(layer_scale=True, num_registers=3))
    wanted = shapes_of(network(layer_scale=True, num_registers=3), 6, 6)
    position = np.full((1, 1, WIDTH), 0.25, np.float32)
    own = {name: array for name, array in of_timm.items() if name != "reg_token"}
    own |= {
        "register_tokens": of_timm["reg_token"],
        "mask_token": mask,
        "cls_token": of_timm["cls_token"] - position,
        "pos_embed": np.concatenate([position, of_timm["pos_embed"]], axis=1),
    }
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-7),
        torch_names.from_torch(own, wanted),
        torch_names.from_torch(of_timm, wanted),
    )
    assert not vit_names.remark(own, wanted)
    larger = shapes_of(network(layer_scale=True, num_registers=3), 8, 8)
    for arrays in (own, of_timm):
        assert "for 3x3 patches, and a view of this run has 4x4" in vit_names.remark(arrays, larger)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "patch", "size", "count"),
    [
        # timm's totals without the classifier.
        ("timm_vit_tiny", 16, 224, 5_524_416),
        ("timm_vit_small", 16, 224, 21_665_664),
        ("dinov2_small", 14, 518, 22_056_192),
        ("dinov2_small_registers", 14, 518, 22_057_344),
    ],
)
def test_backbones_have_the_arrays_of_timm_s(name, patch, size, count):
    module = joint.CLASS_TOKEN_VITS[name](patch_size=patch)
    wanted = shapes_of(module, size, size)
    assert joint.parameter_count(wanted["params"]) == count
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), wanted)
    found = {key: array.shape for key, array in torch_names.to_torch(zeros).items()}
    expected = timm_shapes(
        width=192 if "tiny" in name else 384,
        depth=12,
        patch=patch,
        num_patches=(size // patch) ** 2,
        layer_scale="dinov2" in name,
        num_registers=4 if "registers" in name else 0,
    )
    assert found == {k: v for k, v in expected.items() if not k.startswith("head.")}
    heads = {"timm_vit_tiny": 3}.get(name, 6)
    assert module.num_heads == heads


def test_what_does_not_fit_is_named():
    arrays = random_arrays(timm_shapes())
    wanted = shapes_of(network(), 6, 6)
    extra = {
        "dist_token": np.zeros((1, 1, WIDTH)),
        "fc_norm.weight": np.zeros(WIDTH),
        "blocks.0.ls1.gamma": np.zeros(WIDTH),
        "register_tokens": np.zeros((1, 4, WIDTH)),
    }
    wrong = {**arrays, **extra, "blocks.1.mlp.fc1.bias": np.zeros(5)}
    del wrong["blocks.0.attn.qkv.weight"]
    with pytest.raises(ValueError, match="timm's names") as caught:
        torch_names.from_torch(wrong, wanted)
    message = str(caught.value)
    assert "missing from the weights: blocks.0.attn.qkv.weight" in message
    for name in extra:
        assert f"only in the weights: {name}" in message
    assert "blocks.1.mlp.fc1.bias: weights has ((5,)," in message
    assert 'set model.backbone="dinov2_small_registers"' in message
    assert "a distilled DeiT" in message
    assert "LayerScale" in message
    # The title, six arrays and four hints.
    assert message.count("\n") == 10
    for shape in ((1, 12, WIDTH), (1, 1, WIDTH), (10, WIDTH), (1, 10, WIDTH + 1), (2, 10, WIDTH)):
        with pytest.raises(ValueError, match=r"pos_embed: weights has"):
            torch_names.from_torch({**arrays, "pos_embed": np.zeros(shape)}, wanted)
    with pytest.raises(ValueError, match=r"patch_embed\.proj\.weight: weights has"):
        torch_names.from_torch(arrays, shapes_of(network().clone(patch_size=3), 9, 9))
    with pytest.raises(ValueError, match="missing from the weights: reg_token"):
        torch_names.from_torch(arrays, shapes_of(network(num_registers=3), 6, 6))


def test_positions_learn_from_crops_of_another_size():
    module = network()
    variables: Any = torch_names.from_torch(random_arrays(timm_shapes()), shapes_of(module, 6, 6))
    images = np.random.default_rng(0).normal(size=(2, 4, 4, CHANNELS)).astype(np.float32)

    def total(params: Any) -> jax.Array:
        output: Any = module.apply({"params": params}, images, train=True)
        return (output * jnp.arange(WIDTH, dtype=jnp.float32)[None]).sum()

    gradient = jax.jit(jax.grad(total))(variables["params"])
    assert gradient["positions"].shape == (3, 3, WIDTH)
    assert (np.abs(gradient["positions"]) > 0).all()


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match=r"pool must be one of \['class', 'mean'\], got 'max'"):
        network(pool="max")
    with pytest.raises(ValueError, match="multiple of num_heads = 2, got 9"):
        network().clone(hidden_size=9)
    with pytest.raises(ValueError, match="num_registers must be at least 0, got -1"):
        network(num_registers=-1)
    with pytest.raises(ValueError, match=r"patch_size = 2 must divide.*got 6x5"):
        shapes_of(network(), 6, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "theirs", "patch", "own"),
    [
        ("timm_vit_tiny", "vit_tiny_patch16_224", 16, 224),
        ("timm_vit_tiny", "deit_tiny_patch16_224", 16, 224),
        ("timm_vit_small", "vit_small_patch16_224", 16, 224),
        ("dinov2_small", "vit_small_patch14_dinov2", 14, 518),
        ("dinov2_small_registers", "vit_small_patch14_reg4_dinov2", 14, 518),
    ],
)
def test_outputs_are_those_of_the_installed_timm(name, theirs, patch, own):
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(theirs, num_classes=0, dynamic_img_size=True).eval()
    for parameter in model.parameters():  # away from zeros, ones and the tiny LayerScale
        parameter.data += 0.05 * torch.randn_like(parameter)
    arrays = {key: value.numpy() for key, value in model.state_dict().items()}
    module = joint.CLASS_TOKEN_VITS[name](patch_size=patch)
    variables = torch_names.from_torch(arrays, shapes_of(module, own, own))
    back = torch_names.to_torch(variables)
    assert set(back) == set(arrays)
    for key, array in back.items():
        np.testing.assert_array_equal(array, arrays[key])

    def agree(variables: Any, model: Any, size: int) -> None:
        images = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)
        with torch.no_grad():
            tokens = model.forward_features(torch.from_numpy(images.transpose(0, 3, 1, 2)))
            expected = {
                "class": model.forward_head(tokens, pre_logits=True).numpy(),
                "mean": tokens[:, model.num_prefix_tokens :].mean(1).numpy(),
            }
        for pool, wanted in expected.items():
            pooled = module.clone(pool=pool)
            found = jax.jit(functools.partial(pooled.apply, train=False))(variables, images)
            difference = np.abs(found - wanted).max() / np.abs(wanted).max()
            print(f"{theirs} at {size}, {pool}: {difference:.1e}")
            assert difference < 1e-4

    # At 224, at the size of small crops, and with positions that were resampled on loading.
    agree(variables, model, 224)
    agree(variables, model, 7 * patch)
    resized = timm.create_model(theirs, num_classes=0, img_size=8 * patch).eval()
    resized.load_state_dict(
        timm.models.vision_transformer.checkpoint_filter_fn(model.state_dict(), resized)
    )
    resampled = torch_names.from_torch(arrays, shapes_of(module, 8 * patch, 8 * patch))
    agree(resampled, resized, 8 * patch)
