# pyright: reportMissingImports=false
"""stable-pretraining's JAX trainer: its SimSiam, its blocks, its loop, its views on the device.

`stable_pretraining.jax` 0.1.8 has no jitter of saturation and hue, crops squares alone, its projector has
no BatchNorm, and its ResNet one width: the narrow one here is built from its blocks.
"""

import importlib.metadata
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import stable_pretraining.jax as spj
from flax import nnx
from serve import serve
from stable_pretraining.jax.augment import two_view_transform
from stable_pretraining.jax.backbone import resnet
from stable_pretraining.jax.forward import simsiam


class NarrowResNet18(resnet.ResNet):
    """Its ResNet-18 with the CIFAR stem, of any width."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: Any):
        self.low_resolution = True
        self.stem_conv = resnet._conv(3, width, 3, 1, rngs, [(1, 1), (1, 1)], dtype)
        self.stem_bn = resnet._bn(width, rngs, None)
        stages, before = [], width
        for stage in range(4):
            after = width * 2**stage
            first = resnet.BasicBlock(before, after, 1 if stage == 0 else 2, rngs, None, dtype)
            stages.append(
                nnx.Sequential(first, resnet.BasicBlock(after, after, 1, rngs, None, dtype))
            )
            before = after
        self.stages = nnx.List(stages)
        self.embed_dim = before


def make(settings: dict[str, Any]) -> Any:
    """Facts and timers, see `serve`."""
    images = np.load(settings["images"])["images"].astype(np.float32) / 255
    rngs = nnx.Rngs(0)
    dtype = settings["dtype"] if settings["dtype"] != "float32" else None
    backbone = NarrowResNet18(settings["width"], rngs=rngs, dtype=dtype)
    dim = settings["head_dim"]
    module = spj.Module(
        forward=simsiam,
        optim=optax.sgd(0.06, momentum=0.9),
        transform=two_view_transform(settings["image_size"]),
        backbone=backbone,
        projector=spj.backbone.MLP(backbone.embed_dim, [dim, dim, dim], rngs=rngs),
        predictor=spj.backbone.MLP(dim, [dim // 4, dim], rngs=rngs),
        simsiam_loss=spj.NegativeCosineSimilarity(),
    )
    draw = np.random.default_rng(0)

    def train(count: int) -> float:
        """The clock starts after the first batch: `fit` makes an optimizer, and compiles, anew."""
        starts = []

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for _ in range(1 + count):
                index = draw.integers(len(images), size=settings["batch_size"])
                yield {"image": images[index]}
                starts.append(time.perf_counter())  # the trainer has read the loss of that step

        spj.Trainer(max_epochs=1, enable_validation=False).fit(module, batches())
        jax.block_until_ready(nnx.state(module))
        return time.perf_counter() - starts[0]

    facts = {
        "stable-pretraining": importlib.metadata.version("stable-pretraining"),
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
    }
    return facts, {"train": train}


if __name__ == "__main__":
    serve(make)
