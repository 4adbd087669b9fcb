"""Scaling on paper: the time of a training step on 8 to 512 chips, from counts and data sheets.

python -m benchmarks.scaling_model --out=runs/scaling

ResNet-50 at 224 pixels, JEVB, two views, a global batch of 4096. A step is

    compute + all-reduce of gradients + all-reduces of BatchNorm's statistics,

one after the other: real programs hide part of the second behind the first. Parameters and operations are
counted from the model on abstract shapes; peaks and bandwidths are the makers' figures; the share of the
peak that is reached, and the latencies, are assumptions. Nothing here was measured. Writes `scaling.json`
and `scaling.md`.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import measure
from configs import imagenet
from jevb_jax.networks import joint
from jevb_jax.networks.joint import JointEmbeddingModel
from jevb_jax.report import tables
from jevb_jax.runs import files

# Assumptions.
MODEL_FLOPS_UTILISATION = 0.3  # share of the bfloat16 peak; BatchNorm networks are bound by memory
INNER_HOP_SECONDS = 1e-6
OUTER_HOP_SECONDS = 10e-6

NUM_VIEWS = 2
BYTES_PER_FLOAT = 4  # gradients and statistics are float32


class Chip(NamedTuple):
    """One accelerator and its links; bandwidths are one way, a chip, all its links together.

    Attributes:
      name: as in the table.
      peak_flops: operations a second, bfloat16, dense.
      inner_bandwidth: bytes a second over ICI or NVLink.
      inner_size: chips that these links join.
      torus_dims: dimensions of the ICI torus; 0 is a switch.
      outer_bandwidth: bytes a second between such groups (InfiniBand, the data center's network).
      chips_per_host: chips that one host feeds.
    """

    name: str
    peak_flops: float
    inner_bandwidth: float
    inner_size: int
    torus_dims: int
    outer_bandwidth: float
    chips_per_host: int


# cloud.google.com/tpu/docs (v4, v5e, v5p: bf16 peak; ICI 2400, 1600 and 4800 Gbit/s a chip; pods of
# 4096, 256 and 8960 chips; data center network 6.4 Tbit/s a v5e pod and 50 Gbit/s a v5p chip; v4's is
# not used below 4096 chips, v5p's stands in). NVIDIA's data sheets of H100 SXM (989 Tflop/s dense,
# NVLink 900 GB/s both ways) and DGX H100 (eight GPUs, one 400 Gbit/s InfiniBand port each).
CHIPS = (
    Chip("TPU v4", 275e12, 300e9, 4096, 3, 6.25e9, 4),
    Chip("TPU v5e", 197e12, 200e9, 256, 2, 3.125e9, 8),
    Chip("TPU v5p", 459e12, 600e9, 8960, 3, 6.25e9, 4),
    Chip("H100", 989e12, 450e9, 8, 0, 50e9, 8),
)


class Workload(NamedTuple):
    """What a step has to do, whatever the chips.

    Attributes:
      batch_size: images a step, global.
      flops_per_image: of all views, forward and backward.
      num_parameters: of the whole model; each has a gradient.
      num_norm_layers: BatchNorm layers.
      num_norm_features: their channels, together.
      input_bytes_per_image: as the host sends it to the device.
    """

    batch_size: int
    flops_per_image: float
    num_parameters: int
    num_norm_layers: int
    num_norm_features: int
    input_bytes_per_image: int


class StepTime(NamedTuple):
    """Seconds and bytes of one step.

    Attributes:
      compute: seconds.
      gradients: seconds of their all-reduce.
      norm: seconds of BatchNorm's all-reduces.
      input_bytes_per_host: bytes a step.
    """

    compute: float
    gradients: float
    norm: float
    input_bytes_per_host: float

    @property
    def total(self) -> float:
        """Seconds of the step, nothing overlapped."""
        return self.compute + self.gradients + self.norm


def ring_seconds(num_bytes: float, num_chips: int, bandwidth: float) -> float:
    """Transfer time of a ring all-reduce: `2 (n - 1) / n bytes / bandwidth`, without latency.

    Args:
      num_bytes: of the array that is summed.
      num_chips: `n`.
      bandwidth: bytes a second, one way.

    Returns:
      Seconds.
    """
    return 2 * (num_chips - 1) / num_chips * num_bytes / bandwidth


def latency_hops(num_chips: int, torus_dims: int) -> float:
    """Messages that follow one another in an all-reduce of next to nothing.

    Args:
      num_chips: that take part.
      torus_dims: `d` of a torus, rings along each side in turn: `2 d (n^(1/d) - 1)`; 0 is a switch, a
        tree: `2 ceil(log2 n)`.

    Returns:
      Their number, there and back.
    """
    if torus_dims == 0:
        return 2 * math.ceil(math.log2(num_chips))
    return 2 * torus_dims * (num_chips ** (1 / torus_dims) - 1)


def all_reduce_seconds(num_bytes: float, num_chips: int, chip: Chip) -> float:
    """Time of one all-reduce: within groups of `inner_size`, and between them.

    Between groups each chip carries its share, `1 / inner_size` of the array.

    Args:
      num_bytes: of the array that is summed.
      num_chips: that take part.
      chip: and its links.

    Returns:
      Seconds.

    Raises:
      ValueError: more chips than one group, and not a multiple of it.
    """
    inner = min(num_chips, chip.inner_size)
    if num_chips % inner:
        raise ValueError(
            f"{num_chips} chips are not whole groups of {chip.name}: give a multiple of "
            f"{chip.inner_size}"
        )
    groups = num_chips // inner
    within = ring_seconds(num_bytes, inner, chip.inner_bandwidth)
    within += latency_hops(inner, chip.torus_dims) * INNER_HOP_SECONDS
    between = ring_seconds(num_bytes / inner, groups, chip.outer_bandwidth)
    between += latency_hops(groups, 0) * OUTER_HOP_SECONDS
    return within + between


def step_time(work: Workload, num_chips: int, chip: Chip, *, utilisation: float) -> StepTime:
    """Time of a step.

    BatchNorm over the global batch sums two numbers a channel forward (mean, mean square), two backward,
    layer by layer and view by view: many small all-reduces, bound by latency.

    Args:
      work: of a step.
      num_chips: divides the batch.
      chip: and its links.
      utilisation: share of the peak that is reached.

    Returns:
      Its parts.

    Raises:
      ValueError: the chips do not divide the batch, or are not whole groups.
    """
    if work.batch_size % num_chips:
        raise ValueError(
            f"a batch of {work.batch_size} does not divide among {num_chips} chips: choose a multiple"
        )
    num_all_reduces = 2 * NUM_VIEWS * work.num_norm_layers
    norm_bytes = 2 * NUM_VIEWS * 2 * work.num_norm_features * BYTES_PER_FLOAT
    num_hosts = math.ceil(num_chips / chip.chips_per_host)
    return StepTime(
        compute=work.batch_size
        * work.flops_per_image
        / (num_chips * chip.peak_flops * utilisation),
        gradients=all_reduce_seconds(work.num_parameters * BYTES_PER_FLOAT, num_chips, chip),
        norm=num_all_reduces * all_reduce_seconds(norm_bytes / num_all_reduces, num_chips, chip),
        input_bytes_per_host=work.batch_size * work.input_bytes_per_image / num_hosts,
    )


def count_workload(
    model: JointEmbeddingModel, *, batch_size: int, view_size: int, stored_size: int
) -> Workload:
    """Counts a model on abstract shapes: nothing is computed, no memory is taken.

    The objective and the augmentations are left out: thousands of operations a feature and a pixel beside
    billions of the network's.

    Args:
      model: networks.
      batch_size: images a step, global.
      view_size: pixels a side of a view.
      stored_size: pixels a side of an image as it is sent to the device, uint8.

    Returns:
      The workload of a step.
    """
    num_images = 2  # BatchNorm needs two
    views = jax.ShapeDtypeStruct((num_images, view_size, view_size, 3), jnp.float32)
    variables = jax.eval_shape(
        lambda key, views: model.init(key, views, train=True), jax.random.key(0), views
    )
    statistics = jax.tree.leaves(variables["batch_stats"])  # a mean and a variance a layer

    def gradient(params: Any, batch_stats: Any, views: jax.Array) -> Any:
        def total(params: Any) -> jax.Array:
            outputs, _ = model.apply(
                {"params": params, "batch_stats": batch_stats},
                views,
                train=True,
                mutable=["batch_stats"],
            )
            return sum(
                (leaf.sum() for leaf in jax.tree.leaves((outputs.embedding, outputs.prediction))),
                jnp.zeros(()),
            )

        return jax.value_and_grad(total)(params)

    flops = measure.counted_flops(gradient, variables["params"], variables["batch_stats"], views)
    return Workload(
        batch_size=batch_size,
        flops_per_image=NUM_VIEWS * flops / num_images,
        num_parameters=joint.parameter_count(variables["params"]),
        num_norm_layers=len(statistics) // 2,
        num_norm_features=sum(leaf.size for leaf in statistics) // 2,
        input_bytes_per_image=stored_size * stored_size * 3,
    )


def scaling_rows(work: Workload, num_chips: tuple[int, ...], *, utilisation: float) -> list[dict]:
    """The table's rows, of every chip in `CHIPS`.

    Args:
      work: of a step.
      num_chips: ascending; efficiency is against the first.
      utilisation: share of the peak that is reached.

    Returns:
      One dictionary a row.
    """
    rows = []
    for chip in CHIPS:
        first = step_time(work, num_chips[0], chip, utilisation=utilisation)
        for number in num_chips:
            step = step_time(work, number, chip, utilisation=utilisation)
            rows.append(
                {
                    "chip": chip.name,
                    "num_chips": number,
                    "compute_ms": 1e3 * step.compute,
                    "gradients_ms": 1e3 * step.gradients,
                    "norm_ms": 1e3 * step.norm,
                    "step_ms": 1e3 * step.total,
                    "images_per_second": work.batch_size / step.total,
                    "efficiency": first.total * num_chips[0] / (step.total * number),
                    "input_megabytes_per_second_and_host": step.input_bytes_per_host
                    / step.total
                    / 1e6,
                }
            )
    return rows


def to_markdown(rows: list[dict]) -> str:
    """The rows as a table.

    Args:
      rows: of `scaling_rows`.

    Returns:
      Markdown.
    """
    columns = {
        "chip": ("chip", "{}"),
        "chips": ("num_chips", "{}"),
        "compute, ms": ("compute_ms", "{:.1f}"),
        "gradients, ms": ("gradients_ms", "{:.2f}"),
        "BatchNorm, ms": ("norm_ms", "{:.2f}"),
        "step, ms": ("step_ms", "{:.1f}"),
        "images/s": ("images_per_second", "{:,.0f}"),
        "efficiency": ("efficiency", "{:.2f}"),
        "input per host, MB/s": ("input_megabytes_per_second_and_host", "{:,.0f}"),
    }
    cells = [[form.format(row[name]) for name, form in columns.values()] for row in rows]
    return "\n".join(tables.markdown_table(list(columns), cells)) + "\n"


def imagenet_workload(batch_size: int) -> Workload:
    """JEVB of configs/imagenet.py.

    Args:
      batch_size: images a step, global.

    Returns:
      The workload of a step.
    """
    config: Any = imagenet.get_config()
    model = joint.make_model(head="posterior", has_likelihood_scale=False, **config.model.to_dict())
    return count_workload(
        model,
        batch_size=batch_size,
        view_size=config.augmentation.image_size,
        stored_size=config.data.image_size,
    )


def main() -> None:
    """Counts and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, default=4096)
    parser.add_argument("--num_chips", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--utilisation", type=float, default=MODEL_FLOPS_UTILISATION)
    arguments = parser.parse_args()
    work = imagenet_workload(arguments.batch_size)
    rows = scaling_rows(work, tuple(arguments.num_chips), utilisation=arguments.utilisation)
    facts = {
        "command": " ".join(["python -m benchmarks.scaling_model", *sys.argv[1:]]),
        "jax": jax.__version__,
        "utilisation": arguments.utilisation,
        "inner_hop_seconds": INNER_HOP_SECONDS,
        "outer_hop_seconds": OUTER_HOP_SECONDS,
        "workload": work._asdict(),
        "chips": [chip._asdict() for chip in CHIPS],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    files.write_json_atomically(arguments.out / "scaling.json", {**facts, "rows": rows})
    files.write_text_atomically(arguments.out / "scaling.md", to_markdown(rows))
    print(work, to_markdown(rows), sep="\n\n")


if __name__ == "__main__":
    main()
