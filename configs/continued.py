r"""Goes on with pre-training from published weights, on pictures of one's own; for one GPU.

    python train.py --config=configs/continued.py:timm_vit_small --workdir=runs/mine \
      --config.data.train_paths=my_pictures --config.init.workdir=model.safetensors

`docs/use.md` says which files fit. The argument is `resnet18`, `resnet34` or `resnet50` (torchvision,
timm), `timm_vit_tiny` or `timm_vit_small` (ViT-Ti/16 and ViT-S/16 of timm, and DeiT), `dinov2_small` or
`dinov2_small_registers`. timm's own ViTs read pictures with mean and standard deviation 0.5, and all
others, DeiT among them, with those of ImageNet: give `deit_tiny` or `deit_small` for DeiT.

The values are meant for about 10,000 pictures, and no run has chosen them: a low learning rate, rates
that fall towards the first layers, and two full views and four small crops of each picture.
"""

from typing import Any

from ml_collections import ConfigDict

from jevb_jax.configs import default

_RESNETS = ("resnet18", "resnet34", "resnet50")
_PATCHES = {
    "timm_vit_tiny": 16,
    "timm_vit_small": 16,
    "deit_tiny": 16,
    "deit_small": 16,
    "dinov2_small": 14,
    "dinov2_small_registers": 14,
}
