"""Why do heavy tails collapse when the KL weight is below one: the scale, or the pair weights?

python -m studies.collapse --out=runs/collapse

A Student-t does two things that its Gaussian limit does not:

* It lets the *scale* shrink, because far in the tail a smaller scale costs almost nothing.
* It *weighs pairs*. A pair with squared length `Q` pulls with the weight `w = (df + n) / (df + Q)`, so
  pairs that already agree pull hardest.

This program switches each of the two on separately and takes the other gradient from the Gaussian. The
directional term is

    log p_A(u | m, held(s)) + log p_B(u | held(m), s)

Its first part moves directions and its second part moves scales. `m` is the sampled direction, so the
first part also reaches the scale through the noise.

The recipe is that of `studies/cifar10_uncertainty.py` with KL weight 0.1 and unit prior, for the first
third of its 1,248 steps. Nothing is evaluated. A collapse shows in the spread of the directions of a
batch, which is 1 for uniform directions and 0 for one point.
"""

import argparse
import dataclasses
import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from matplotlib.figure import Figure

from jevb_jax import methods
from jevb_jax.images import batch_order, batches
from jevb_jax.networks.joint import ViewOutputs
from jevb_jax.paper import densities, likelihood, sphere
from jevb_jax.report import figures, tables
from jevb_jax.runs import files
from jevb_jax.training import experiment, health
from jevb_jax.training.step import make_train_chunk
from studies import cifar10_uncertainty

DF = 5.0
KL_WEIGHT = 0.1
NUM_STEPS = 416
EVERY_STEPS = 16
# By name of an arm: the density that moves the directions, the density that moves the scale.
ARMS = {
    "Student-t": ("student", "student"),
    "Gaussian": ("gaussian", "gaussian"),
    "directions Student-t, scale Gaussian": ("student", "gaussian"),
    "directions Gaussian, scale Student-t": ("gaussian", "student"),
    "weights of pairs with mean one, scale Gaussian": ("relative", "gaussian"),
    "one mean weight for all pairs, scale Gaussian": ("mean", "gaussian"),
}


def pair_weights(squared_length: Array, *, df: float, n: int) -> Array:
    """`w = (df + n) / (df + Q)`, the pull of a pair relative to the Gaussian, `[batch]`.

    Args:
      squared_length: `[batch]`, `Q`.
      df: degrees of freedom.
      n: dimension of the tangent space.
    """
    return (df + n) / (df + squared_length)


def split_log_prob(u: Array, m: Array, s: Array, *, directions: str, scale: str) -> Array:
    """The directional term; one density gives its gradient in the directions, another in the scale.

    Args:
      u: `[batch, D]`, directions of the target embeddings.
      m: `[batch, D]`, sampled directions.
      s: `[batch, D]`, scales.
      directions: "gaussian"; "student"; "relative", the Gaussian with the Student-t's pair weights
        divided by their batch mean; or "mean", the Gaussian with this batch mean for all pairs.
      scale: "gaussian" or "student".

    Returns:
      `[batch]`. Only its gradients are meaningful.
    """
    df = {"student": DF, "gaussian": math.inf}
    held_s, held_m = jax.lax.stop_gradient(s), jax.lax.stop_gradient(m)
    of_scale = densities.directional_log_prob(u, loc=held_m, scale_diag=s, df=df[scale])
    of_directions = densities.directional_log_prob(
        u, loc=m, scale_diag=held_s, df=df.get(directions, math.inf)
    )
    if directions in ("relative", "mean"):
        squared_length, _ = sphere.scaled_tangent_squared_length(
            u, m, held_s, coordinates="chordal"
        )
        weights = pair_weights(squared_length, df=DF, n=u.shape[-1] - 1)
        mean = jnp.mean(weights)
        weights = weights / mean if directions == "relative" else jnp.full_like(weights, mean)
        # The Gaussian contains -Q/2. This changes it to -w Q/2 and keeps the determinant.
        of_directions += (1 - jax.lax.stop_gradient(weights)) * squared_length / 2
    return of_scale + of_directions


def split_jevb(
    key: Array,
    views: Sequence[ViewOutputs],
    targets: Sequence[ViewOutputs],
    *,
    step: Any,
    radial_scale: Array | None,
    directions: str,
    scale: str,
) -> methods.MethodOutput:
    """`methods.jevb` with `split_log_prob` as its directional term."""
    del step
    if radial_scale is None:
        raise ValueError("needs the radial scale of a model whose head gives a posterior")
    keys = jax.vmap(functools.partial(jax.random.split, num=2))(key)
    losses, weights, divergences = [], [], []
    for view, target, pair_keys in zip(views, targets[::-1], keys.T, strict=True):
        u, radius = sphere.polar_decomposition(jax.lax.stop_gradient(target.embedding))
        noise = jax.vmap(functools.partial(jax.random.normal, shape=u.shape[-1:]))(pair_keys)
        m, rho = sphere.polar_decomposition(view.posterior_mean + view.posterior_scale * noise)
        s = likelihood.likelihood_scale(view.posterior_scale)
        directional = split_log_prob(u, m, s, directions=directions, scale=scale)
        radial = densities.radial_log_prob(radius, loc=rho, scale=radial_scale, df=DF)
        kl = densities.gaussian_kl_divergence(view.posterior_mean, view.posterior_scale)
        divergences.append(kl)
        losses.append((KL_WEIGHT * kl - directional - radial) / u.shape[-1])
        squared_length, _ = sphere.scaled_tangent_squared_length(u, m, s, coordinates="chordal")
        weights.append(pair_weights(squared_length, df=DF, n=u.shape[-1] - 1))
    weight = jnp.concatenate(weights)
    both = jnp.concatenate([target.embedding for target in targets])
    metrics = {
        "posterior_scale": jnp.mean(views[0].posterior_scale),
        "kl": jnp.mean(divergences[-1]),
        "effective_rank": health.effective_rank(jax.lax.stop_gradient(both)),
        "mean_weight": jnp.mean(weight),
        "share_of_pairs": jnp.square(jnp.mean(weight)) / jnp.mean(jnp.square(weight)),
    }
    return methods.MethodOutput((losses[0] + losses[1]) / 2, metrics)


def run(arm: str, seed: int, *, num_steps: int) -> list[dict[str, Any]]:
    """Trains an arm and returns its metrics every `EVERY_STEPS` steps.

    Args:
      arm: a key of `ARMS`.
      seed: determines parameters, order of the data and noise.
      num_steps: number of training steps.

    Returns:
      One row for each logged step.
    """
    config = cifar10_uncertainty.run_config("jevb", jevb__prior_scale=1.0)
    config.seed = seed
    directions, scale = ARMS[arm]
    method = functools.partial(split_jevb, directions=directions, scale=scale)
    setup = dataclasses.replace(experiment.build_experiment(config), method=method)
    images = jax.device_put(batches.load_resident(setup.dataset.train))
    chunk = make_train_chunk(setup.train_step)
    state, rows = setup.initial_state(), []
    for step in range(num_steps):
        indices = batch_order.batch_indices(
            step,
            num_examples=len(setup.dataset.train),
            batch_size=setup.config["train"]["batch_size"],
            seed=seed,
        )
        result = chunk(state, images, jnp.asarray(indices)[None], jnp.asarray(1), setup.key)
        if not result.is_finite:
            raise FloatingPointError(f"{arm}, seed {seed}: step {step} is not finite")
        state = result.state
        if (step + 1) % EVERY_STEPS == 0:
            values = {name: float(value[0]) for name, value in result.metrics.items()}
            rows.append({"arm": arm, "seed": seed, "step": step + 1, **values})
    return rows


def figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Spread of the directions, effective rank and posterior scale by step; a row for each seed."""
    panels = {
        "embedding_std": "spread of the directions (1 = uniform)",
        "effective_rank": "effective rank",
        "posterior_scale": "posterior scale",
    }
    seeds = sorted({row["seed"] for row in rows})
    drawn = Figure(figsize=(12, 1.2 + 3.4 * len(seeds)), layout="constrained")
    axes = drawn.subplots(len(seeds), len(panels), squeeze=False)
    for seed, of_seed in zip(seeds, axes, strict=True):
        for axis, (name, title) in zip(of_seed, panels.items(), strict=True):
            for index, arm in enumerate(ARMS):
                mine = [row for row in rows if row["arm"] == arm and row["seed"] == seed]
                axis.plot(
                    [row["step"] for row in mine],
                    [row[name] for row in mine],
                    label=arm,
                    lw=1.2,
                    **figures.line_style(index),
                )
            axis.set_title(f"{title}, seed {seed}", fontsize=10)
            axis.set_xlabel("step")
            axis.set_ylim(bottom=0)
    drawn.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return drawn


def write(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Writes `collapse.csv` and `collapse.png`."""
    header = list(rows[0])
    text = tables.csv_table(header, [[row[name] for name in header] for row in rows])
    out.mkdir(parents=True, exist_ok=True)
    files.write_text_atomically(out / "collapse.csv", text)
    drawing = io.BytesIO()
    figure(rows).savefig(drawing, format="png", dpi=110)
    files.write_bytes_atomically(out / "collapse.png", drawing.getvalue())


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num_steps", type=int, default=NUM_STEPS)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        for arm in ARMS:
            rows += run(arm, seed, num_steps=arguments.num_steps)
            write(rows, arguments.out)
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
