# pyright: reportMissingImports=false
"""torchvision's and kornia's augmentations, whole views of SimSiam and operation by operation.

Timers, `LIBRARY/OPERATION`: `pillow` is torchvision on Pillow images, one at a time, as DataLoader's
processes run it; `v2` is torchvision's v2 on uint8 tensors, one at a time; `v2 batch` on a
whole batch, which draws once for all its images and so is no replacement; `kornia` on float batches,
one draw an image.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import kornia
import kornia.augmentation as kornia_augmentation
import numpy as np
import torch
import torchvision
from serve import serve
from torchvision import transforms
from torchvision.transforms import v2


def make(settings: dict[str, Any]) -> Any:
    """Facts and timers, see `serve`."""
    size, kernel = settings["image_size"], settings["kernel_size"]
    mean, std = settings["mean"], settings["std"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(settings["num_threads"])
    images = np.random.default_rng(0).integers(
        0, 256, (settings["batch_size"], size, size, 3), np.uint8
    )
    pillow = [transforms.ToPILImage()(image) for image in images]
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)
    floats = batch.float() / 255

    def torchvision_operations(t: Any) -> dict[str, Any]:
        jitter = t.ColorJitter(0.4, 0.4, 0.4, 0.1)
        operations = {
            "crop and resize": t.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            "flip": t.RandomHorizontalFlip(p=1.0),
            "jitter": jitter,
            "grey": t.RandomGrayscale(p=1.0),
            "blur": t.GaussianBlur(kernel, (0.1, 2.0)),
            "solarise": t.RandomSolarize(128, p=1.0),
        }
        to_tensor = (
            [t.ToTensor()]
            if t is transforms
            else [t.ToImage(), t.ToDtype(torch.float32, scale=True)]
        )
        operations["view"] = t.Compose(
            [
                operations["crop and resize"],
                t.RandomHorizontalFlip(),
                t.RandomApply([jitter], p=0.8),
                t.RandomGrayscale(p=0.2),
                t.RandomApply([operations["blur"]], p=0.5),
                *to_tensor,
                t.Normalize(mean, std),
            ]
        )
        return operations

    def kornia_operations() -> dict[str, Any]:
        crop = kornia_augmentation.RandomResizedCrop(
            (size, size),
            scale=(0.2, 1.0),
            # The default, "slice", resizes image by image, which is quick on a CPU alone.
            cropping_mode="slice" if device.type == "cpu" else "resample",
        )

        def blur(p: float) -> Any:
            return kornia_augmentation.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=p)

        return {
            "crop and resize": crop,
            "flip": kornia_augmentation.RandomHorizontalFlip(p=1.0),
            "jitter": kornia_augmentation.ColorJitter(0.4, 0.4, 0.4, 0.1, p=1.0),
            "grey": kornia_augmentation.RandomGrayscale(p=1.0),
            "blur": blur(1.0),
            "solarise": kornia_augmentation.RandomSolarize(0.0, 0.0, p=1.0),
            "view": torch.nn.Sequential(
                crop,
                kornia_augmentation.RandomHorizontalFlip(p=0.5),
                kornia_augmentation.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
                kornia_augmentation.RandomGrayscale(p=0.2),
                blur(0.5),
                kornia_augmentation.Normalize(torch.tensor(mean), torch.tensor(std)),
            ).to(device),
        }

    def timer(call: Callable[[], Any], count: int) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(count):
                call()
            if device.type == "cuda":
                torch.cuda.synchronize()
        return time.perf_counter() - start

    def each(operation: Any, values: Any) -> list[Any]:
        return [operation(value) for value in values]

    on_tensors = torchvision_operations(v2)
    calls: dict[str, Callable[[], Any]] = {}
    for name, operation in torchvision_operations(transforms).items():
        calls[f"pillow/{name}"] = functools.partial(each, operation, pillow)
    for name, operation in on_tensors.items():
        calls[f"v2/{name}"] = functools.partial(each, operation, batch)
        calls[f"v2 batch/{name}"] = functools.partial(operation, batch)
    for name, operation in kornia_operations().items():
        calls[f"kornia/{name}"] = functools.partial(operation, floats)
    facts = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "kornia": kornia.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }
    return facts, {name: functools.partial(timer, call) for name, call in calls.items()}


if __name__ == "__main__":
    serve(make)
