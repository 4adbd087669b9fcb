"""The likelihood `p(h | z)` of an embedding given a latent: its settings, its scale, its terms.

The embedding is split into direction and radius, `h = r u`, and the latent into `z = rho m`:

    log p(h | z) = log p_dir(u | m, s) + log p_rad(r | rho)   [ - n log r, constant in the
    parameters ]

Equation numbers are those of `docs/mathematics.md`.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Real

from jevb_jax.paper import densities, domain, mass, sphere

ScaleUnits = Literal["sphere", "unit"]
SCALE_UNITS: tuple[ScaleUnits, ...] = ("sphere", "unit")
Factorization = Literal["factorised", "unfactorised"]
LIKELIHOODS: tuple[Factorization, ...] = ("factorised", "unfactorised")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["df", "radial_df", "radial_scale"],
    meta_fields=["scale_units", "coordinates", "space", "tails", "normalized", "likelihood"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Settings of the density of an embedding given a latent (docs eq. 4, 6 and 16).

    It is a pytree. The three numbers are leaves, so they may be learned, traced, or given for each
    example. The choices are static. `dataclasses.replace` makes a changed copy.

    Attributes:
      df: degrees of freedom of the directional term, at least 1e-12; `inf` is the Gaussian.
      radial_df: degrees of freedom of the radial term, at least 1e-12; `inf` is the Gaussian.
      radial_scale: width of the radial term, positive: relative if `space` is "log", else a length.
      scale_units: how a deviation of the posterior is converted to the unit sphere, by
        `likelihood_scale`.
      coordinates: tangent coordinates, as for `directional_log_prob`.
      space: where the radius is Student-t, as for `radial_log_prob`.
      tails: as for `directional_log_prob`.
      normalized: whether the directional density is divided by its mass on the sphere.
      likelihood: "factorised" into direction and radius, or "unfactorised", which is one Student-t
        about `z` in `R^D` (docs eq. 16) and uses only `df` and `scale_units` of these settings.

    Raises:
      ValueError: a choice does not exist, or feature-wise tails are combined with stereographic
        coordinates. Numbers are checked where they are used.
    """

    df: Real[ArrayLike, "*batch"]
    radial_df: Real[ArrayLike, "*batch"]
    radial_scale: Real[ArrayLike, "*batch"]
    scale_units: ScaleUnits = "sphere"
    coordinates: sphere.Coordinates = "chordal"
    space: densities.Space = "log"
    tails: mass.Tails = "joint"
    normalized: bool = False
    likelihood: Factorization = "factorised"

    def __post_init__(self) -> None:
        domain.choice("scale_units", self.scale_units, SCALE_UNITS)
        domain.choice("space", self.space, densities.SPACES)
        domain.choice("likelihood", self.likelihood, LIKELIHOODS)
        mass.check_tails(self.tails, self.coordinates)

    @property
    def is_factorised(self) -> bool:
        """Whether direction and radius have separate densities."""
        return self.likelihood == "factorised"


def likelihood_scale(
    posterior_scale: Real[ArrayLike, "*batch D"], *, scale_units: ScaleUnits = "sphere"
) -> Float[Array, "*batch D"]:
    """The tied scale of the directional term, `s_i = c_D sigma_i` (docs eq. 11).

    Args:
      posterior_scale: standard deviations of the latent, positive.
      scale_units: "sphere" gives `c_D = 1/sqrt(D)`, the length of a latent deviation on the unit
        sphere, because the prior's radius is near `sqrt(D)`. "unit" gives `c_D = 1`.

    Raises:
      ValueError: `scale_units` is unknown, or a known scale is not positive. A traced scale that is
        not positive gives NaN.
    """
    domain.choice("scale_units", scale_units, SCALE_UNITS)
    (sigma,) = sphere.at_least_float32(posterior_scale)
    sigma = domain.positive("posterior_scale", posterior_scale, sigma)
    if sigma.ndim < 1:
        raise ValueError(f"posterior_scale must be [..., D], got the number {posterior_scale}")
    return sigma / float(np.sqrt(sigma.shape[-1])) if scale_units == "sphere" else sigma


class LogLikelihood(NamedTuple):
    """Terms of `log p(h | z)`, in nats.

    Attributes:
      directional: `log p_dir(u | m, s)`, divided by the mass if the likelihood is normalized. For
        an unfactorized likelihood, all of `log p(h | z)`.
      radial: `log p_rad(r | rho)`; zero if unfactorized.
      log_mass: `log M(m, s)` (docs eq. 31); zero if unfactorized.
    """

    directional: Float[Array, "*batch"]
    radial: Float[Array, "*batch"]
    log_mass: Float[Array, "*batch"]


def log_likelihood_terms(
    embedding: Float[Array, "*batch D"],
    latent: Float[Array, "*batch D"],
    likelihood: Likelihood,
    *,
    scale_diag: Float[Array, "*batch D"],
    location: Float[Array, "*batch D"] | None = None,
) -> LogLikelihood:
    """`log p_dir(u | m, s)` and `log p_rad(r | rho)` for given latents (docs eq. 4 and 6).

    Args:
      embedding: `h = r u`.
      latent: `z = rho m`.
      likelihood: its numbers are `[*batch]`, or one for all.
      scale_diag: `s`, in units of the sphere.
      location: if given, `m` is its direction and not that of the latent.
    """
    s, df = scale_diag, likelihood.df
    if not likelihood.is_factorised:
        loc = latent if location is None else location
        whole = densities.multivariate_student_t_log_prob(embedding, loc=loc, scale_diag=s, df=df)
        return LogLikelihood(whole, jnp.zeros_like(whole), jnp.zeros_like(whole))

    u, r = sphere.polar_decomposition(embedding)
    m, rho = sphere.polar_decomposition(latent)
    if location is not None:
        m, _ = sphere.polar_decomposition(location)
    density: Any = {"df": df, "coordinates": likelihood.coordinates, "tails": likelihood.tails}
    log_p_dir = densities.directional_log_prob(u, loc=m, scale_diag=s, **density)
    # If the density is not divided by the mass, the mass is only logged and needs no gradient.
    held = (lambda x: x) if likelihood.normalized else jax.lax.stop_gradient
    log_mass = mass.directional_log_mass(held(s), loc=held(m), **density)
    log_p_rad = densities.radial_log_prob(
        r, loc=rho, scale=likelihood.radial_scale, df=likelihood.radial_df, space=likelihood.space
    )
    return LogLikelihood(
        log_p_dir - log_mass if likelihood.normalized else log_p_dir, log_p_rad, log_mass
    )


def embedding_log_prob(
    embedding: Real[ArrayLike, "*#batch D"],
    latent: Real[ArrayLike, "*#batch D"],
    likelihood: Likelihood,
    *,
    scale_diag: Real[ArrayLike, "*#batch #D"] | Real[ArrayLike, ""],
) -> Float[Array, "*#batch"]:
    """`log p(h | z)` as a density in `R^D`, with the polar Jacobian `-(D - 1) log r` (docs eq. 12).

    The training objective leaves the Jacobian out, because it is constant in the parameters. An
    unfactorized likelihood is already a density in `R^D` and has no Jacobian.

    Args:
      embedding: `h`, not the zero vector.
      latent: `z`.
      likelihood: its numbers broadcast against the batch.
      scale_diag: `s`, scale of the directional term, in units of the sphere.

    Returns:
      Nats.

    Raises:
      ValueError: for the reasons of `directional_log_prob` and `radial_log_prob`.
    """
    h, z, s, df, radial_df, radial_scale = sphere.at_least_float32(
        embedding, latent, scale_diag, likelihood.df, likelihood.radial_df, likelihood.radial_scale
    )
    s = domain.positive("scale_diag", scale_diag, s)
    numbers = checked_numbers(likelihood, df, radial_df, radial_scale)
    h, z, s, df, radial_df, radial_scale = domain.broadcast(
        {"embedding": h, "latent": z}, numbers, {"scale_diag": s}
    )
    likelihood = dataclasses.replace(
        likelihood, df=df, radial_df=radial_df, radial_scale=radial_scale
    )
    log_p_dir, log_p_rad, _ = log_likelihood_terms(h, z, likelihood, scale_diag=s)
    if not likelihood.is_factorised:
        return log_p_dir
    n, log_r = h.shape[-1] - 1, sphere.safe_log(sphere.safe_norm(h))
    return log_p_dir + log_p_rad - n * log_r


def checked_numbers(
    likelihood: Likelihood,
    df: Float[Array, "..."],
    radial_df: Float[Array, "..."],
    radial_scale: Float[Array, "..."],
) -> dict[str, Float[Array, "..."]]:
    """The numbers of a likelihood by name, cast and checked.

    Args:
      likelihood: holds the numbers as they were given.
      df: `likelihood.df` as an array of a float type.
      radial_df: `likelihood.radial_df` as an array of a float type.
      radial_scale: `likelihood.radial_scale` as an array of a float type.

    Raises:
      ValueError: a known number is not positive. Traced ones become NaN.
    """
    return {
        "df": domain.degrees_of_freedom("df", likelihood.df, df),
        "radial_df": domain.degrees_of_freedom("radial_df", likelihood.radial_df, radial_df),
        "radial_scale": domain.positive("radial_scale", likelihood.radial_scale, radial_scale),
    }
