"""Writes a trained ResNet with torchvision's names, or a ViT with timm's, for PyTorch.

`python -m jevb_jax.convert --workdir=runs/cifar10 --out=resnet18.safetensors`

In PyTorch, `model.load_state_dict(safetensors.torch.load_file("resnet18.safetensors"), strict=False)`
then reports only the classifier `fc` as missing. A run with `model.stem = "cifar"` needs a torchvision
ResNet whose `conv1` is a 3x3 convolution of stride 1 and whose `maxpool` is the identity. The
backbones `timm_vit_*` and `dinov2_*` fit `timm.create_model(..., num_classes=0, img_size=...)` with
`image_size` of the metadata; `vit_*` fit no network of timm. Images are normalized with
`augmentation.mean` and `std` of the run; both are in the metadata of the file.

The way back needs no command: `init.workdir` of a training takes such a file (docs/use.md).
"""

import argparse
import json
import sys
from collections.abc import Sequence

from safetensors import numpy as safetensors

from jevb_jax import small_programs
from jevb_jax.loading import load
from jevb_jax.model import Model
from jevb_jax.networks.torch_names import to_torch
from jevb_jax.runs import files


def torch_weights(model: Model) -> bytes:
    """The encoder of a model as safetensors with torchvision's or timm's names.

    Args:
      model: from `load`, with a ResNet or a `ClassTokenViT` as backbone.

    Returns:
      The content of the file.

    Raises:
      ValueError: the backbone is another network.
    """
    parts = ("params", "batch_stats")  # a network without BatchNorm has no statistics
    backbone = {part: model.variables.get(part, {}).get("backbone", {}) for part in parts}
    settings = model.settings
    metadata = {
        "backbone": settings.model.backbone,
        "stem": settings.model.stem,  # of a ResNet; the next two are of a ViT
        "patch_size": str(settings.model.patch_size),
        "pool": settings.model.pool,
        "image_size": str(settings.augmentation.image_size),
        "mean": json.dumps(list(settings.augmentation.mean)),
        "std": json.dumps(list(settings.augmentation.std)),
    }
    return safetensors.save(to_torch(backbone), metadata)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jevb_jax.convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--workdir",
        required=True,
        help="directory of a run (its latest checkpoint is taken) or of an export",
    )
    parser.add_argument("--out", required=True, help="file to write, .safetensors")
    arguments = parser.parse_args(argv)
    if not arguments.out.endswith(".safetensors"):
        parser.error(f"--out must end in .safetensors, got {arguments.out!r}")

    def work() -> str:
        content = torch_weights(load(arguments.workdir))
        files.write_bytes_atomically(files.to_path(arguments.out), content)
        return f"Written to {arguments.out}"

    return small_programs.run(work, "Converting")


if __name__ == "__main__":
    sys.exit(main())
