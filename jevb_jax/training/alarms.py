"""Alarms: which health numbers say that something is wrong with a run."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jevb_jax.training.health import FLOOR_MARGIN

# Thresholds of the alarms. "Healthy runs" are those of `docs/results`, and short runs of every
# method and of JEVB with other priors, at D from 16 to 512, looked at from step 20 on.

# A health check uses BatchNorm's running statistics, and each step keeps 0.9 of their old value.
# Before this step more than 12% of their arbitrary start is left. Even healthy runs then show
# directions that are all alike (embedding_std 0.16) and radii 16 times too small.
ALARM_WARMUP_STEPS = 20
# Early in a healthy run, too, the likelihood is below the uniform density: smoke runs of 48 steps end
# before it rises.
INFORMATION_WARMUP_STEPS = 200
# At this value 1 - std^2 = 0.91 of the squared length lies along the mean direction. Healthy runs stay
# above 0.5. A projector without BatchNorm has 0.8, because ReLU leaves a common offset.
MIN_EMBEDDING_STD = 0.3
# JEVB with its location at the posterior's mean collapses to 5.6 of 128 axes, and accuracy suffers.
# Healthy runs stay above 8 of 64 axes and, where D is small, above 0.4 D. The lower limit counts.
MIN_EFFECTIVE_RANK = 6.0
MIN_EFFECTIVE_RANK_SHARE = 0.2
# Times sqrt(D). A loss that only measures distances (VICReg's invariance alone) shrinks the radius, and
# the directions do not show it. Healthy runs stay above 0.3.
MIN_RADIUS = 0.01
# For a whole image, not for a dimension: at any D, E[KL(q || p)] bounds how many nats a sample tells
# about its image. Telling one half of the images from the other takes log 2 = 0.69.
MIN_POSTERIOR_KL_NATS = 0.5
MAX_SHARE_AT_FLOOR = 0.1
# Relative to sqrt(D). A projector that ends with BatchNorm has that radius, and one without begins
# within a factor of 1.6 of it. Healthy runs stay within 3.
MAX_RADIUS_FACTOR = 5.0
# The lower limit: sampling the latent alone gives the log-radius a standard deviation of
# 1 / sqrt(2 D), which is more than this for every D under 100,000. The network's own floor is 1e-3.
# The upper limit is a factor of 20 in the radius.
RADIAL_WIDTH_RANGE = (2e-3, 3.0)
# With concentration k, the power spherical density at its mean direction is 2^k times that at a right
# angle: here 3.5% more. Training starts at 0.69, and the network's floor is 1e-3.
MIN_CONCENTRATION = 0.05
# The mean cosine is k / (D - 1 + k). At this value directions are predicted to within 2.6 degrees.
MAX_MEAN_COSINE = 0.999


class Alarm(NamedTuple):
    """A value that left the band of healthy runs.

    Attributes:
      name: `collapse`, `posterior_is_prior`, `scale_at_floor`, `radius_drift`, `concentration` or
        `no_information`.
      message: one line: what was measured, the threshold, what it means and what to try.
    """

    name: str
    message: str


class AlarmPeriod(NamedTuple):
    """The time from one raising of an alarm until it cleared.

    Attributes:
      step: where the health check raised it.
      message: what that check said, and when it cleared.
    """

    step: int
    name: str
    message: str

    @property
    def is_standing(self) -> bool:
        """Whether the last health check of the run still raised it."""
        return self.message.endswith(_STANDING)


_STANDING = "Not cleared by the last health check."


def _is_outside(value: float, lower: float = -math.inf, upper: float = math.inf) -> bool:
    """Whether a value lies outside a band. NaN and infinities do."""
    return not (math.isfinite(value) and lower <= value <= upper)


def _collapse(values: Mapping[str, float], embedding_dim: int) -> str | None:
    seen = []
    if _is_outside(std := values["embedding_std"], MIN_EMBEDDING_STD):
        seen.append(
            f"embedding_std {std:.3g} is not above {MIN_EMBEDDING_STD}: the embeddings share one "
            "direction"
        )
    rank = values.get("effective_rank")
    lowest = min(MIN_EFFECTIVE_RANK, MIN_EFFECTIVE_RANK_SHARE * embedding_dim)
    if rank is not None and _is_outside(rank, lowest):
        seen.append(
            f"effective rank {rank:.3g} of D = {embedding_dim} is not above {lowest:.3g}: the "
            "embeddings vary along few axes"
        )
    log_radius = values.get("embedding_log_radius")
    if log_radius is not None and _is_outside(log_radius, math.log(MIN_RADIUS)):
        seen.append(
            f"mean radius {math.exp(log_radius):.3g} sqrt(D) is not above {MIN_RADIUS}: the "
            "embeddings shrink to a point"
        )
    if not seen:
        return None
    return (
        f"{'; '.join(seen)}. Try train.target_decay = 0.99 or optimizer.name = 'muon' for jevb, with "
        "jevb.location = 'sample'; the weights of their published loss for others; a lower "
        "optimizer.learning_rate or weight_decay for all."
    )


def _posterior_is_prior(values: Mapping[str, float], embedding_dim: int) -> str | None:
    kl = values["posterior_kl_per_dimension"] * embedding_dim
    if not _is_outside(kl, MIN_POSTERIOR_KL_NATS):
        return None
    return (
        f"KL(q || p) {kl:.3g} nats an image is not above {MIN_POSTERIOR_KL_NATS}: the posterior is "
        "the prior, whatever the image, and its uncertainty says nothing. Try a lower "
        "jevb.kl_weight, a longer jevb.kl_warmup_epochs or another jevb.prior_scale."
    )


def _scale_at_floor(values: Mapping[str, float], embedding_dim: int) -> str | None:
    del embedding_dim
    seen = []
    for name in ("posterior", "likelihood"):
        share = values.get(f"{name}_scale_at_floor")
        if share is not None and _is_outside(share, upper=MAX_SHARE_AT_FLOOR):
            seen.append(f"{share:.1%} of the {name} scales")
    if not seen:
        return None
    return (
        f"{' and '.join(seen)}, not under {MAX_SHARE_AT_FLOOR:.0%}, are within "
        f"{FLOOR_MARGIN - 1:.0%} of model.min_scale: the floor sets them, not the images. Try a "
        "higher jevb.kl_weight, or a lower model.min_scale if the scales are meant to be so small."
    )


def _radius_drift(values: Mapping[str, float], embedding_dim: int) -> str | None:
    del embedding_dim
    seen = []
    log_radius, limit = values["embedding_log_radius"], math.log(MAX_RADIUS_FACTOR)
    if _is_outside(log_radius, -limit, limit):
        seen.append(
            f"mean radius {math.exp(log_radius):.3g} sqrt(D) is not within a factor of "
            f"{MAX_RADIUS_FACTOR:g} of sqrt(D): nothing holds the embeddings' radius"
        )
    if _is_outside(width := values["radial_width"], *RADIAL_WIDTH_RANGE):
        lower, upper = RADIAL_WIDTH_RANGE
        seen.append(
            f"relative width of the radial likelihood is {width:.3g}, not in [{lower:g}, {upper:g}]: "
            "the radial term has become a spike or says nothing"
        )
    if not seen:
        return None
    return (
        f"{'; '.join(seen)}. Try model.projector_normalizes_output = True, a lower "
        "optimizer.learning_rate or weight_decay, or jevb.space = 'log'."
    )


def _concentration(values: Mapping[str, float], embedding_dim: int) -> str | None:
    concentration = values["concentration_mean"]
    highest = MAX_MEAN_COSINE / (1 - MAX_MEAN_COSINE) * (embedding_dim - 1)
    if not _is_outside(concentration, MIN_CONCENTRATION, highest):
        return None
    return (
        f"mean concentration {concentration:.3g} is not in [{MIN_CONCENTRATION}, {highest:.3g}]: the "
        "predicted distributions are all uniform, or all points, and their uncertainty says nothing. "
        "Try a lower optimizer.learning_rate or weight_decay."
    )


def _no_information(values: Mapping[str, float], embedding_dim: int) -> str | None:
    del embedding_dim
    information = values["predictive_information"]
    if not _is_outside(information, 0.0):
        return None
    return (
        f"predictive information {information:.3g} nats an image is below zero: the likelihood of a "
        "view given the other is worse than the uniform density, so its nats say nothing. Try a longer "
        "run. The default settings of jevb can raise this alarm (docs/study.md). A lower "
        "jevb.kl_weight raises the value too, but can collapse: watch the effective rank."
    )


# By the alarm's name: the value without which it is not judged, and the judgment.
_ALARMS: dict[str, tuple[str, Callable[[Mapping[str, float], int], str | None]]] = {
    "collapse": ("embedding_std", _collapse),
    "posterior_is_prior": ("posterior_kl_per_dimension", _posterior_is_prior),
    "scale_at_floor": ("posterior_scale_at_floor", _scale_at_floor),
    "radius_drift": ("radial_width", _radius_drift),
    "concentration": ("concentration_mean", _concentration),
    "no_information": ("predictive_information", _no_information),
}


def judge(values: Mapping[str, float], *, step: int, embedding_dim: int) -> dict[str, str | None]:
    """Every alarm that can be judged from a health check, raised or not.

    Args:
      values: of a health check, by name: those of `representation_health` for all methods; for JEVB
        also `posterior_kl_per_dimension`, `posterior_scale_at_floor`, `radial_width` (of the radial
        likelihood, relative to the radius) and, where it is untied, `likelihood_scale_at_floor`; for
        VI-SimSiam `concentration_mean`; for both `predictive_information`. A value that is not
        finite raises its alarm.
      step: at which the values were measured.
      embedding_dim: D.

    Returns:
      The message by the alarm's name, None where the value is healthy. Alarms of values that are not
      there are left out, `no_information` also before `INFORMATION_WARMUP_STEPS`; before
      `ALARM_WARMUP_STEPS` it is empty.
    """
    if step < ALARM_WARMUP_STEPS:
        return {}
    return {
        name: message_of(values, embedding_dim)
        for name, (needed, message_of) in _ALARMS.items()
        if needed in values and not (name == "no_information" and step < INFORMATION_WARMUP_STEPS)
    }


def health_alarms(values: Mapping[str, float], *, step: int, embedding_dim: int) -> list[Alarm]:
    """The alarms that a health check raises, in a fixed order; arguments as for `judge`."""
    judged = judge(values, step=step, embedding_dim=embedding_dim)
    return [Alarm(name, message) for name, message in judged.items() if message is not None]


def logged_health(record: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a health check by name, from a line of `metrics.jsonl`; empty if it has none."""
    return {
        name.removeprefix("health/"): value
        for name, value in record.items()
        if name.startswith("health/")
    }


def alarm_history(records: Sequence[Mapping[str, Any]], *, embedding_dim: int) -> list[AlarmPeriod]:
    """When which alarm was raised in a run, and until when, judged anew from the logged values.

    Args:
      records: lines of `metrics.jsonl`, in order; those without a health check are passed over.
      embedding_dim: D, `model.embedding_dim` of the run's config.

    Returns:
      Periods in the order of their first steps.
    """
    periods: list[AlarmPeriod] = []
    raised: dict[str, int] = {}  # positions in `periods`
    for record in records:
        step: int = record["step"]
        judged = judge(logged_health(record), step=step, embedding_dim=embedding_dim)
        for name, message in judged.items():
            if message is not None and name not in raised:
                raised[name] = len(periods)
                periods.append(AlarmPeriod(step, name, message))
            elif message is None and name in raised:
                index = raised.pop(name)
                cleared = f"{periods[index].message} Cleared at step {step}."
                periods[index] = periods[index]._replace(message=cleared)
    for index in raised.values():
        standing = f"{periods[index].message} {_STANDING}"
        periods[index] = periods[index]._replace(message=standing)
    return periods
