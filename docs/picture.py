"""Draws `docs/picture.png` with the encoder that comes with the package.

python docs/picture.py

The photograph and the digits are those of scikit-learn. The encoder has seen neither. Of CIFAR-10 there
are only the scores of validation images, which come with the encoder.
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits, load_sample_image

import jevb_jax

ENCODER = "jevb-cifar10-resnet18"
TILE = 32
FALSE_ALARM_RATE = 0.05
COLORS = {
    "CIFAR-10, held out": "#2f6db5",
    "digits": "#d1762b",
    "one color": "#4c9a5b",
    "noise": "#9a4c8f",
}


def windows(image: np.ndarray, step: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Square windows of an image, `[rows * columns, TILE, TILE, 3]`, and `(rows, columns)`."""
    found = np.lib.stride_tricks.sliding_window_view(image, (TILE, TILE), axis=(0, 1))[
        ::step, ::step
    ]
    shape = found.shape[0], found.shape[1]
    return found.transpose(0, 1, 3, 4, 2).reshape(-1, TILE, TILE, 3), shape


def outside_sets() -> dict[str, np.ndarray]:
    """Images that are no photographs, uint8 `[N, h, w, 3]`, by name."""
    rng = np.random.default_rng(0)
    bunch: Any = load_digits()
    levels = (bunch.images[:400] * 255 / 16).astype(np.uint8)
    digits = np.repeat(levels[..., None], 3, axis=-1)
    colors = rng.integers(0, 256, size=(400, 1, 1, 3), dtype=np.uint8)
    return {
        "digits": np.kron(digits, np.ones((1, 4, 4, 1), np.uint8)),
        "one color": np.broadcast_to(colors, (400, TILE, TILE, 3)).copy(),
        "noise": rng.integers(0, 256, size=(400, TILE, TILE, 3), dtype=np.uint8),
    }


def main() -> None:
    """Writes the picture beside this file."""
    model = jevb_jax.load(ENCODER)
    detector = model.detector(FALSE_ALARM_RATE)

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), width_ratios=(1, 1, 1.25))
    # Half as many pixels, so that a window holds as much of the scene as a small image does.
    small = load_sample_image("china.jpg")[::2, ::2]
    tiles, shape = windows(small, step=4)
    scores = detector.score(tiles).reshape(shape)
    axes[0].imshow(small)
    axes[0].set_title("a photograph")
    margin = TILE / 2
    extent = (margin, small.shape[1] - margin, small.shape[0] - margin, margin)
    axes[1].imshow(small)
    shown = axes[1].imshow(
        scores, extent=extent, cmap="magma", alpha=0.75, interpolation="bilinear"
    )
    axes[1].set_title("how unlike CIFAR-10 is each part?")
    figure.colorbar(shown, ax=axes[1], fraction=0.035, label="score")
    for panel in axes[:2]:
        panel.set_axis_off()

    saved = model.fitted_scores
    if saved is None:
        raise SystemExit(f"{ENCODER} has no fitted scores")
    scores_of = {"CIFAR-10, held out": saved.calibration[detector.score_name]}
    scores_of |= {name: detector.score(images) for name, images in outside_sets().items()}
    low, high = np.percentile(np.concatenate([*scores_of.values()]), (0.5, 97))
    for name, values in scores_of.items():
        share = np.mean(values > detector.threshold)
        axes[2].hist(
            np.clip(values, low, high),
            bins=np.linspace(low, high, 60),
            density=True,
            alpha=0.6,
            color=COLORS[name],
            label=f"{name}: {share:.0%} alarms",
        )
    axes[2].axvline(detector.threshold, color="black", linestyle="--", linewidth=1)
    axes[2].set_title("which images raise an alarm?")
    axes[2].set_xlabel("score; higher ones are drawn at the right edge")
    axes[2].set_yticks([])
    axes[2].legend(frameon=False, fontsize=8, loc="upper center")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("picture.png"), dpi=100)


if __name__ == "__main__":
    main()
