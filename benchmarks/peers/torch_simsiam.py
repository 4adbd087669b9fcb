# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""A SimSiam step in PyTorch from lightly's published parts: its loss, its heads, its transforms.

The encoder is torchvision's BasicBlock in a ResNet-18 with the CIFAR stem, at any width. Timers:
`workers/MODE` (lightly's SimSiamTransform on Pillow images in DataLoader's processes) and `device/MODE`
(images resident on the device, kornia's augmentations there), where MODE is `eager`, `channels_last`,
or `compiled` (torch.compile of the networks and the loss, channels-last); `encoder/MODE`, forward and
backward of the encoder alone; `features/MODE`, its forward pass in evaluation; `matmul`, the ceiling.
"""

import functools
import time
from typing import Any

import kornia
import kornia.augmentation as kornia_augmentation
import lightly
import numpy as np
import torch
import torchvision
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules.heads import SimSiamPredictionHead, SimSiamProjectionHead
from lightly.transforms import SimSiamTransform
from serve import serve
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

MODES = ("eager", "channels_last", "compiled")


class NarrowResNet18(ResNet):
    """torchvision's ResNet-18 of any width, with the CIFAR stem and without the classifier."""

    def __init__(self, width: int):
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity()
        self.fc = nn.Identity()
        self.inplanes = width
        for stage in range(4):
            layer = self._make_layer(BasicBlock, width * 2**stage, 2, stride=1 if stage == 0 else 2)
            setattr(self, f"layer{stage + 1}", layer)


class SimSiam(nn.Module):
    """lightly's SimSiam: backbone, projection head, prediction head, symmetric loss."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.backbone = NarrowResNet18(width)
        self.projection = SimSiamProjectionHead(8 * width, head_dim, head_dim)
        self.prediction = SimSiamPredictionHead(head_dim, head_dim // 4, head_dim)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, view_1: torch.Tensor, view_2: torch.Tensor) -> torch.Tensor:
        """The loss of two views."""
        z1, z2 = self.projection(self.backbone(view_1)), self.projection(self.backbone(view_2))
        p1, p2 = self.prediction(z1), self.prediction(z2)
        return (self.criterion(z1.detach(), p2) + self.criterion(z2.detach(), p1)) / 2


class Images(torch.utils.data.Dataset):
    """Pillow images of an array, through a transform."""

    def __init__(self, images: np.ndarray, transform: Any):
        self.images, self.transform = images, transform
        self.to_pil = torchvision.transforms.ToPILImage()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.to_pil(self.images[index]))


class Worker:
    """Builds what a timer needs at its first turn, and keeps it."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        self.images = np.load(settings["images"])["images"]
        self.size = settings["image_size"]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(settings["num_threads"])
        else:
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")  # TF32, as JAX's default on this hardware
        self.resident = torch.from_numpy(self.images).to(self.device)
        self.mean, self.std = settings["mean"], settings["std"]
        self.model = functools.cache(self._make_model)
        self.encoder = functools.cache(self._make_encoder)
        self.device_views = nn.Sequential(
            kornia_augmentation.RandomResizedCrop(
                (self.size, self.size),
                scale=(0.2, 1.0),
                # The default, "slice", resizes image by image, which is quick on a CPU alone.
                cropping_mode="slice" if self.device.type == "cpu" else "resample",
            ),
            kornia_augmentation.RandomHorizontalFlip(p=0.5),
            kornia_augmentation.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
            kornia_augmentation.RandomGrayscale(p=0.2),
            kornia_augmentation.Normalize(torch.tensor(self.mean), torch.tensor(self.std)),
        ).to(self.device)

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def autocast(self) -> Any:
        """Mixed precision, where `dtype` asks for it."""
        is_half = self.settings["dtype"] == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=is_half)

    def _make_model(self, mode: str) -> tuple[Any, Any, torch.memory_format]:
        """Networks, optimizer and memory layout of a mode."""
        torch.manual_seed(0)
        model = SimSiam(self.settings["width"], self.settings["head_dim"]).to(self.device).train()
        layout = torch.contiguous_format if mode == "eager" else torch.channels_last
        model = model.to(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), 0.06, momentum=0.9, weight_decay=5e-4)
        return (torch.compile(model) if mode == "compiled" else model), optimizer, layout

    def step(self, mode: str, view_1: torch.Tensor, view_2: torch.Tensor) -> None:
        """Forward, backward, update."""
        model, optimizer, layout = self.model(mode)
        views = (
            view.to(self.device, non_blocking=True, memory_format=layout)
            for view in (view_1, view_2)
        )
        with self.autocast():
            loss = model(*views)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def from_workers(self, mode: str, count: int) -> float:
        """Steps before the clock starts and batches after it stops, as many as are read ahead.

        The processes then make as many batches within the time as are trained on.
        """
        num_ahead = 2 * self.settings["num_workers"]  # DataLoader's own prefetch
        batch_size = self.settings["batch_size"]
        transform = SimSiamTransform(
            input_size=self.size,
            gaussian_blur=0.0,
            normalize={"mean": self.mean, "std": self.std},
        )
        num_batches = count + 2 * num_ahead
        indices = torch.randint(len(self.images), (num_batches * batch_size,)).tolist()
        loader = torch.utils.data.DataLoader(
            torch.utils.data.Subset(Images(self.images, transform), indices),
            batch_size=batch_size,
            num_workers=self.settings["num_workers"],
            pin_memory=self.device.type == "cuda",
        )
        batches = iter(loader)
        for _ in range(num_ahead):
            self.step(mode, *next(batches))
        self.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            self.step(mode, *next(batches))
        self.synchronize()
        return time.perf_counter() - start

    def draw(self) -> torch.Tensor:
        """A batch of the resident images, floats."""
        indices = torch.randint(
            len(self.resident), (self.settings["batch_size"],), device=self.device
        )
        return self.resident[indices].permute(0, 3, 1, 2).float() / 255

    def on_device(self, mode: str, count: int) -> float:
        """Steps with views made on the device."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            images = self.draw()
            with torch.no_grad():
                views = self.device_views(images), self.device_views(images)
            self.step(mode, *views)
        self.synchronize()
        return time.perf_counter() - start

    def views(self, count: int) -> float:
        """Two views of a batch on the device, alone."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            images = self.draw()
            with torch.no_grad():
                _ = self.device_views(images), self.device_views(images)
        self.synchronize()
        return time.perf_counter() - start

    def _make_encoder(self, mode: str) -> tuple[Any, torch.memory_format]:
        """The encoder and memory layout of a mode."""
        layout = torch.contiguous_format if mode == "eager" else torch.channels_last
        encoder = NarrowResNet18(self.settings["width"]).to(self.device).to(memory_format=layout)
        return (torch.compile(encoder) if mode == "compiled" else encoder), layout

    def encode(self, mode: str, count: int, *, train: bool) -> float:
        """The encoder alone, on ready views."""
        encoder, layout = self.encoder(mode)
        encoder.train(train)
        num = self.settings["batch_size"] * (2 if train else 1)
        images = torch.randn(num, 3, self.size, self.size, device=self.device)
        images = images.to(memory_format=layout)
        self.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            with self.autocast(), torch.set_grad_enabled(train):
                out = encoder(images).float()
            if train:
                out.square().mean().backward()
                encoder.zero_grad(set_to_none=True)
        self.synchronize()
        return time.perf_counter() - start

    def matmul(self, count: int) -> float:
        """The ceiling."""
        size = self.settings["matmul_size"]
        dtype = getattr(torch, self.settings["dtype"])
        a = torch.randn(size, size, device=self.device, dtype=dtype)
        self.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            _ = a @ a
        self.synchronize()
        return time.perf_counter() - start


def make(settings: dict[str, Any]) -> Any:
    """Facts and timers, see `serve`."""
    worker = Worker(settings)
    timers: dict[str, Any] = {"matmul": worker.matmul, "views": worker.views}
    for mode in MODES:
        timers[f"workers/{mode}"] = functools.partial(worker.from_workers, mode)
        timers[f"device/{mode}"] = functools.partial(worker.on_device, mode)
        timers[f"encoder/{mode}"] = functools.partial(worker.encode, mode, train=True)
        timers[f"features/{mode}"] = functools.partial(worker.encode, mode, train=False)
    facts = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "lightly": lightly.__version__,
        "kornia": kornia.__version__,
        "device": torch.cuda.get_device_name() if worker.device.type == "cuda" else "cpu",
        "platform": "gpu" if worker.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "data_workers": settings["num_workers"],
        "parameters": sum(p.numel() for p in worker.model("eager")[0].parameters()),
    }
    return facts, timers


if __name__ == "__main__":
    serve(make)
