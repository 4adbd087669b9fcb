"""Time and memory of the JEVB objective, beside SimSiam's loss, the encoder's step and the floor.

python -m benchmarks.objective_cost --out=runs/objective_cost

Forward and backward of the loss alone, from the two views' embeddings and posteriors to the gradients
of the posteriors, against SimSiam's and against forward and backward of a ResNet with a CIFAR stem on two
views. Bytes are XLA's count; the fewest possible reads each of six inputs `[batch, D]` once and writes
four gradients. Writes `objective_cost.json` and `objective_cost.md`.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure
from jevb_jax.networks.resnet import ResNet
from jevb_jax.paper import baselines, objective
from jevb_jax.paper.likelihood import Likelihood
from jevb_jax.xla_options import network_options

LIKELIHOOD = Likelihood(df=5.0, radial_df=5.0, radial_scale=0.5)
FEWEST_ARRAYS = 10  # six read, four written


def losses_of(batch: int, dim: int, num_samples: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Forward and backward of both losses, to be compiled, with their arguments, by name."""
    keys = jax.random.split(jax.random.key(0), 6)
    normal = [jax.random.normal(key, (batch, dim)) for key in keys]
    posteriors = (normal[2], normal[3], *(0.3 * jax.nn.softplus(x) + 0.01 for x in normal[4:]))
    example_keys = jax.random.split(jax.random.key(1), batch)

    def jevb(posteriors: tuple[jax.Array, ...], targets: Any, keys: jax.Array) -> jax.Array:
        mean_1, mean_2, scale_1, scale_2 = posteriors
        views = (
            objective.View(targets[0], mean_1, scale_1),
            objective.View(targets[1], mean_2, scale_2),
        )
        terms = objective.symmetric_elbo(
            keys, *views, likelihood=LIKELIHOOD, num_samples=num_samples
        )
        return -jnp.mean(terms.weighted_elbo) / dim

    def simsiam(predictions: tuple[jax.Array, ...], targets: Any) -> jax.Array:
        return jnp.mean(baselines.simsiam_loss(*predictions, *targets).loss)

    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "jevb": (jevb, (posteriors, tuple(normal[:2]), example_keys)),
        "simsiam": (simsiam, (posteriors[:2], tuple(normal[:2]))),
    }
    return {
        name: (jax.jit(jax.value_and_grad(loss)), arguments)
        for name, (loss, arguments) in calls.items()
    }


def encoder_of(batch: int, width: int) -> tuple[Any, tuple[Any, ...]]:
    """Forward and backward of a ResNet-18 on two views of CIFAR's size, in float32."""
    encoder = ResNet((2, 2, 2, 2), bottleneck=False, stem="cifar", width=width)
    images = jax.random.normal(jax.random.key(0), (2, batch, 32, 32, 3))
    variables = jax.jit(functools.partial(encoder.init, train=True))(
        jax.random.key(0), images[0, :2]
    )

    def loss(params: Any, images: jax.Array) -> jax.Array:
        total = jnp.zeros(())
        for view in images:
            output: Any = encoder.apply(
                {**variables, "params": params}, view, train=True, mutable=["batch_stats"]
            )[0]
            total = total + jnp.mean(jnp.square(output))
        return total

    arguments = (variables["params"], images)
    return jax.jit(jax.value_and_grad(loss), compiler_options=network_options()), arguments


def cost_of(*, batch: int, D: int, samples: int, num_rounds: int) -> dict[str, Any]:  # noqa: N803
    """One row: the objective's time and memory, and its time over that of SimSiam's loss."""
    losses = {
        name: (call.lower(*inputs).compile(), inputs)
        for name, (call, inputs) in losses_of(batch, D, samples).items()
    }
    timings = measure.interleave(
        {
            name: functools.partial(measure.seconds_of, functools.partial(*_call(pair)))
            for name, pair in losses.items()
        },
        num_rounds=num_rounds,
    )
    jevb, _ = losses["jevb"]
    seconds = timings["jevb"].median
    array = 4.0 * batch * D
    row = {
        "batch": batch,
        "D": D,
        "samples": samples,
        "JEVB, ms": 1e3 * seconds,
        "JEVB / SimSiam": timings["jevb"].ratio_to(timings["simsiam"]),
        "ns / (batch D samples)": 1e9 * seconds / (batch * D * samples),
        "bytes / fewest": measure.counted_bytes(jevb) / (array * FEWEST_ARRAYS),
        "temporary, arrays [batch, D]": jevb.memory_analysis().temp_size_in_bytes / array,
    }
    print(row, flush=True)
    return row


def main() -> None:
    """Measures and writes."""
    parser = measure.make_parser(__doc__, num_rounds=5)
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 512, 2048, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--num_samples", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--max_elements", type=int, default=2**25, help="of samples x batch x D")
    parser.add_argument("--encoder_batch", type=int, default=512)
    parser.add_argument("--encoder_width", type=int, default=64)
    arguments = parser.parse_args()

    cells = [
        {"batch": batch, "D": dim, "samples": num_samples}
        for batch in arguments.batches
        for dim in arguments.dims
        for num_samples in arguments.num_samples
        if num_samples * batch * dim <= arguments.max_elements
    ]
    varied = [name for name in ("batch", "D", "samples") if len({cell[name] for cell in cells}) > 1]
    # What cannot be told apart is known before the measurement.
    measure.exponents([{**cell, "time": 1.0} for cell in cells], varied, "time")
    rows = [cost_of(**cell, num_rounds=arguments.num_rounds) for cell in cells]
    powers = measure.exponents(rows, varied, "JEVB, ms")

    shares: list[dict[str, Any]] = []
    if arguments.encoder_batch:
        batch = arguments.encoder_batch
        pairs = {
            "encoder": encoder_of(batch, arguments.encoder_width),
            **losses_of(batch, 512, 1),
        }
        timings = measure.interleave(
            {
                name: functools.partial(measure.seconds_of, functools.partial(*_call(pair)))
                for name, pair in pairs.items()
            },
            num_rounds=max(1, min(3, arguments.num_rounds)),
        )
        flops = {
            name: measure.counted_flops(call, *inputs) for name, (call, inputs) in pairs.items()
        }
        shares = [
            {
                "part": name,
                "ms": 1e3 * timing.median,
                "share of encoder": timing.ratio_to(timings["encoder"]),
                "FLOPs / encoder's": flops[name] / flops["encoder"],
                "GFLOP/s": flops[name] / timing.median / 1e9,
            }
            for name, timing in timings.items()
        ]
    title = f"Share of the encoder, batch {arguments.encoder_batch}, D = 512, one sample"
    tables = {
        "Cost": rows,
        "Growth of the time": [{"": "exponent", **powers}],
        **({title: shares} if shares else {}),
    }
    command = "python -m benchmarks.objective_cost " + " ".join(sys.argv[1:])
    facts = measure.environment(command, vars(arguments))
    print(measure.write_results(arguments.out, "objective_cost", facts, tables))


def _call(pair: tuple[Any, tuple[Any, ...]]) -> tuple[Any, ...]:
    compiled, arguments = pair
    return (compiled, *arguments)


if __name__ == "__main__":
    main()
