"""The mathematics a second time, in NumPy, SciPy and mpmath: float64 or better, no JAX, explicit.

Where the package uses a closed form (a determinant lemma, a stable ratio), the derivation here goes
the long way round: an orthonormal basis of the tangent space, the compressed precision matrix and
its determinant, 40 digits.
"""

import math
from typing import Any

import mpmath
import numpy as np
from scipy import optimize, stats


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def random_units(rng, *shape):
    return unit(rng.normal(size=shape))


def tangent_basis(loc):
    """Orthonormal basis `[..., D, D - 1]` of the orthogonal complement of `loc`."""
    return np.linalg.qr(np.asarray(loc, np.float64)[..., None], mode="complete").Q[..., 1:]


def angle(direction, loc):
    u, m = unit(direction), unit(loc)
    return 2 * np.arctan2(np.linalg.norm(u - m, axis=-1), np.linalg.norm(u + m, axis=-1))


def tangent_coordinates(direction, loc, coordinates, basis=None):
    """Coordinates `[..., D - 1]` of `direction` in the tangent space at `loc`."""
    basis = tangent_basis(loc) if basis is None else basis
    flat = np.einsum("...dn,...d->...n", basis, unit(direction))
    half = angle(direction, loc) / 2
    length = 2 * (np.sin(half) if coordinates == "chordal" else np.tan(half))
    norm = np.linalg.norm(flat, axis=-1)
    return flat * (length / np.where(norm > 0, norm, 1))[..., None]


def tangent_precision(scale_diag, basis):
    """The compression of `diag(scale_diag ** -2)` to the tangent space, `[..., D - 1, D - 1]`."""
    half = basis / np.asarray(scale_diag, np.float64)[..., None]
    return np.swapaxes(half, -1, -2) @ half


def from_tangent(y, loc, coordinates):
    """The inverse of `tangent_coordinates`: points of the sphere from `y` `[..., D - 1]`."""
    length = np.linalg.norm(y, axis=-1, keepdims=True)
    theta = 2 * (np.arcsin(length / 2) if coordinates == "chordal" else np.arctan(length / 2))
    tangent = np.einsum("...dn,...n->...d", tangent_basis(loc), y / length)
    return np.cos(theta) * loc + np.sin(theta) * tangent


def _scalar_log_normalizer(df, n):
    if math.isinf(df):
        return -n / 2 * math.log(2 * math.pi)
    with mpmath.workdps(40):
        df = mpmath.mpf(float(df))
        ratio = mpmath.loggamma((df + n) / 2) - mpmath.loggamma(df / 2)
        return float(ratio - mpmath.mpf(n) / 2 * mpmath.log(df * mpmath.pi))


def student_t_log_density(squared_length, df, n):
    """Standard Student-t in `R^n` at the given squared length; `df = inf` is the Gaussian."""
    squared_length, df = np.broadcast_arrays(squared_length, np.asarray(df, np.float64))
    values, index = np.unique(df, return_inverse=True)
    log_normalizer = np.array([_scalar_log_normalizer(v, n) for v in values])[index]
    safe_df = np.where(np.isinf(df), 1.0, df)
    kernel = np.where(
        np.isinf(df),
        -squared_length / 2,
        -(safe_df + n) / 2 * np.log1p(squared_length / safe_df),
    )
    return log_normalizer.reshape(df.shape) + kernel


def directional_log_prob(direction, loc, scale_diag, df, coordinates):
    direction, loc, scale_diag = np.broadcast_arrays(direction, loc, scale_diag)
    n = loc.shape[-1] - 1
    basis = tangent_basis(loc)
    y = tangent_coordinates(direction, loc, coordinates, basis)
    precision = tangent_precision(scale_diag, basis)
    squared_length = np.einsum("...i,...ij,...j->...", y, precision, y)
    value = student_t_log_density(squared_length, df, n) + np.linalg.slogdet(precision)[1] / 2
    if coordinates == "stereographic":
        value = value - 2 * n * np.log(np.cos(angle(direction, loc) / 2))
    return value


def scipy_directional_log_prob(direction, loc, scale_diag, df, coordinates):
    """One point; SciPy's multivariate Student-t or normal in the tangent space."""
    basis = tangent_basis(loc)
    y = tangent_coordinates(direction, loc, coordinates, basis)
    covariance = np.linalg.inv(tangent_precision(scale_diag, basis))
    if np.isinf(df):
        value = stats.multivariate_normal.logpdf(y, cov=covariance)
    else:
        value = stats.multivariate_t.logpdf(y, shape=covariance, df=df)
    n = y.shape[-1]
    return value + (coordinates == "stereographic") * n * np.log(1 + np.sum(y**2) / 4)


def mp_directional_log_prob(direction, loc, scale_diag, df, coordinates):
    """One point, 40 digits; takes and gives mpmath numbers, so that it can be differentiated."""
    dim, n = len(loc), len(loc) - 1

    def dot(a, b):
        return mpmath.fdot(a, b)

    def scaled(a, factor):
        return [x * factor for x in a]

    u = scaled(direction, 1 / mpmath.sqrt(dot(direction, direction)))
    m = scaled(loc, 1 / mpmath.sqrt(dot(loc, loc)))
    # Gram-Schmidt on m and every axis but the one closest to it.
    skip = max(range(dim), key=lambda i: abs(m[i]))
    basis = [m]
    for axis in range(dim):
        if axis != skip:
            v = [mpmath.mpf(i == axis) for i in range(dim)]
            for b in basis:
                overlap = dot(v, b)
                v = [x - overlap * y for x, y in zip(v, b, strict=True)]
            basis.append(scaled(v, 1 / mpmath.sqrt(dot(v, v))))
    basis = basis[1:]
    flat = [dot(b, u) for b in basis]
    theta = mpmath.atan2(mpmath.sqrt(dot(flat, flat)), dot(m, u))
    length = 2 * (mpmath.sin if coordinates == "chordal" else mpmath.tan)(theta / 2)
    y = scaled(flat, length / mpmath.sqrt(dot(flat, flat)))
    precision = mpmath.matrix(n, n)
    for i in range(n):
        for j in range(n):
            terms = zip(basis[i], basis[j], scale_diag, strict=True)
            precision[i, j] = mpmath.fsum(a * b / s**2 for a, b, s in terms)
    squared_length = dot(y, list(precision * mpmath.matrix(y)))
    value = mpmath.log(mpmath.det(precision)) / 2
    if mpmath.isinf(df):
        value += -n * mpmath.log(2 * mpmath.pi) / 2 - squared_length / 2
    else:
        value += mpmath.loggamma((df + n) / 2) - mpmath.loggamma(df / 2)
        value -= n * mpmath.log(df * mpmath.pi) / 2
        value -= (df + n) / 2 * mpmath.log1p(squared_length / df)
    if coordinates == "stereographic":
        value -= 2 * n * mpmath.log(mpmath.cos(theta / 2))
    return value


def radial_log_prob(radius, loc, scale, df, space):
    standardized = (radius - loc) / scale if space == "linear" else np.log(radius / loc) / scale
    value = stats.norm.logpdf(standardized) if np.isinf(df) else stats.t.logpdf(standardized, df)
    return value - np.log(scale if space == "linear" else scale * radius)


def gaussian_kl_divergence(mean, scale, prior_scale):
    """Through the cross entropy and the entropy of SciPy's normal."""
    entropy = stats.norm(mean, scale).entropy()
    cross = 0.5 * np.log(2 * np.pi * prior_scale**2) + (mean**2 + scale**2) / (2 * prior_scale**2)
    return np.sum(cross - entropy, axis=-1)


def log_sphere_area(dim):
    """Of the unit sphere of `R^dim`."""
    return math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)


def von_mises_fisher(cosine, dim, concentration):
    """Log-density (docs eq. 8) and its derivative in the concentration."""
    if concentration == 0:
        return -log_sphere_area(dim), cosine
    with mpmath.workdps(40):
        order, k = mpmath.mpf(dim) / 2 - 1, mpmath.mpf(float(concentration))
        bessel = mpmath.besseli(order, k)
        log_c = order * mpmath.log(k) - (order + 1) * mpmath.log(2 * mpmath.pi) - mpmath.log(bessel)
        mean_cosine = mpmath.besseli(order + 1, k) / bessel
        return float(log_c + k * mpmath.mpf(float(cosine))), float(cosine - mean_cosine)


def power_spherical(cosine, dim, concentration):
    """Log-density and entropy."""
    with mpmath.workdps(40):
        k, beta = mpmath.mpf(float(concentration)), mpmath.mpf(dim - 1) / 2
        alpha = beta + k
        # p(t) (1 - t^2)^(beta - 1) integrates to 1 / area(S^(D-2)): a Beta integral in (1 + t) / 2.
        log_z = (
            (alpha + beta - 1) * mpmath.log(2)
            + mpmath.log(mpmath.beta(alpha, beta))
            + log_sphere_area(dim - 1)
        )
        mean_log = mpmath.log(2) + mpmath.digamma(alpha) - mpmath.digamma(alpha + beta)
        log_prob = k * mpmath.log1p(mpmath.mpf(float(cosine))) - log_z
        return float(log_prob), float(log_z - k * mean_log)


def panels(edges, num_nodes):
    """Composite Gauss-Legendre nodes and weights."""
    x, w = np.polynomial.legendre.leggauss(num_nodes)
    half = np.diff(edges)[:, None] / 2
    return (np.asarray(edges)[:-1, None] + half * (1 + x)).ravel(), (half * w).ravel()


def polar_angle_quadrature(finest):
    """Nodes and weights on `[0, pi]`, refined down to `finest` at zero and to 1e-7 at pi."""
    near_zero, near_pi = np.geomspace(finest, 2, 14), np.geomspace(1e-7, np.pi - 2, 14)
    return panels([0, *near_zero, *(np.pi - near_pi[-2::-1]), np.pi], 12)


def two_sphere_quadrature(pole, finest, num_azimuths=96):
    """Points `[N, 3]` and weights `[N]` on the sphere, refined at `pole` and opposite."""
    theta, theta_weight = polar_angle_quadrature(finest)
    azimuth = 2 * np.pi * (np.arange(num_azimuths) + 0.5) / num_azimuths
    first, second = tangent_basis(pole).T
    around = np.cos(azimuth)[:, None] * first + np.sin(azimuth)[:, None] * second
    points = np.cos(theta)[:, None, None] * pole + np.sin(theta)[:, None, None] * around
    weights = np.repeat((theta_weight * np.sin(theta))[:, None], num_azimuths, 1) * (
        2 * np.pi / num_azimuths
    )
    return points.reshape(-1, 3), weights.ravel()


def gaussian_quadrature(mean, scale, num_nodes=24):
    """Points `[N, D]` and weights `[N]` for the expectation under a diagonal Gaussian."""
    x, w = np.polynomial.hermite_e.hermegauss(num_nodes)
    nodes = np.stack(np.meshgrid(*[x] * len(mean), indexing="ij"), -1).reshape(-1, len(mean))
    weights = np.stack(np.meshgrid(*[w / w.sum()] * len(mean), indexing="ij"), -1).prod(-1)
    return mean + scale * nodes, weights.ravel()


def equal_scale_log_mass(dim, scale, df, num_nodes=200_000):
    """Mass on the sphere of the chordal density with equal scales: one integral over the angle."""
    n = dim - 1
    # Dense in the logarithm of the angle and of its distance to pi.
    near, far = np.geomspace(1e-9, np.pi / 2, num_nodes), np.geomspace(1e-12, np.pi / 2, num_nodes)
    theta = np.concatenate([near, np.pi - far[-2::-1]])
    squared_length = np.square(2 * np.sin(theta / 2) / scale)
    log_density = student_t_log_density(squared_length, np.full_like(theta, df), n)
    sine = np.concatenate([np.sin(near), np.sin(far[-2::-1])])
    with np.errstate(divide="ignore"):
        log_integrand = log_density - n * math.log(scale) + (n - 1) * np.log(sine)
    largest = log_integrand.max()
    integral = np.trapezoid(np.exp(log_integrand - largest), theta)
    return log_sphere_area(n) + largest + math.log(integral)


def _on_hyperplane_log_mass(rng, scale, loc, num_draws):
    """Gaussian features: drawn on the hyperplane, closer to zero than they are, and weighed."""
    exponent = (len(scale) - 3) / 2
    squares = scale**2

    def imbalance(log_tilt):
        total = np.sum(squares / (1 + 2 * math.exp(log_tilt) * squares))
        return log_tilt - math.log(exponent / 4 / max(1 - total / 4, 1e-9))

    log_tilt: Any = optimize.brentq(imbalance, -30, 40)
    tilt = math.exp(log_tilt)
    tilted = squares / (1 + 2 * tilt * squares)
    y = rng.standard_normal((num_draws, len(scale))) * np.sqrt(tilted)
    along = np.sum(loc**2 * tilted)
    y = y - np.outer(y @ loc, loc * tilted) / along
    total = np.sum(y**2, axis=1)
    inside = np.minimum(total, 4 * (1 - 1e-15))
    log_weight = tilt * total + exponent * np.log1p(-inside / 4)
    log_weight = np.where(total < 4, log_weight, -np.inf)
    largest = log_weight.max()
    weight = np.exp(log_weight - largest)
    log_mass = (
        largest
        + math.log(weight.mean())
        - np.sum(np.log1p(2 * tilt * squares)) / 2
        - math.log(along / np.sum(loc**2 * squares)) / 2
    )
    return log_mass, weight.std() / weight.mean() / math.sqrt(num_draws)


def joint_log_mass(rng, scale, loc, df, num_draws=2000, num_nodes=60):
    """Mass of the chordal density and its standard error: Gaussians of every width, by Monte Carlo."""
    if math.isinf(df):
        return _on_hyperplane_log_mass(rng, scale, loc, 20 * num_draws)

    def nodes(low, high, count, draws):
        """Log of the integrand over log(chi-square), and the relative error of each value."""
        u = np.linspace(low, high, count)
        log_density = df / 2 * u - np.exp(u) / 2 - math.lgamma(df / 2) - df / 2 * math.log(2)
        parts = [
            _on_hyperplane_log_mass(rng, scale * math.sqrt(df / math.exp(x)), loc, draws) for x in u
        ]
        return u, log_density + np.array([v for v, _ in parts]), np.array([e for _, e in parts])

    u, values, _ = nodes(
        math.log(df) - 60 / df - 6, math.log(df) + math.log(2 + 200 / df) + 2, 300, 60
    )
    kept = u[values > values.max() - 18]
    u, values, errors = nodes(kept[0], kept[-1], num_nodes, num_draws)
    weight = np.exp(values - values.max()) * (u[1] - u[0])
    error = math.sqrt(np.sum((weight * errors) ** 2)) / weight.sum()
    return values.max() + math.log(weight.sum()), error


def feature_log_mass(rng, scale, loc, df, num_draws=20_000):
    """Mass of the feature-wise density and its standard error, by Monte Carlo.

    All features but one are drawn from their tilted Student-t by its numerical inverse; the last one
    puts the vector on the hyperplane.
    """
    dim, exponent = len(scale), (len(scale) - 3) / 2
    z = np.sinh(np.linspace(-9, 9, 4001)) / 20
    log_factor = stats.t.logpdf(z, df)

    def tilted(tilt):
        density = np.exp(log_factor - tilt * np.outer(scale**2, z**2))
        total = np.trapezoid(density, z, axis=1)
        return density, total, np.trapezoid(density * z**2, z, axis=1) / total * scale**2

    def imbalance(log_tilt):
        second = tilted(math.exp(log_tilt))[2].sum()
        return log_tilt - math.log(exponent / 4 / max(1 - second / 4, 1e-9))

    root: Any = optimize.brentq(imbalance, -8, 25, xtol=1e-3)
    tilt = math.exp(root)
    density, total, _ = tilted(tilt)
    steps = (density[:, 1:] + density[:, :-1]) / 2 * np.diff(z)
    cumulative = np.concatenate([np.zeros((dim, 1)), np.cumsum(steps, axis=1)], axis=1)
    cumulative = cumulative / cumulative[:, -1:]
    last = int(np.argmax(np.abs(loc) * scale))
    others = np.arange(dim) != last
    y = np.empty((num_draws, dim))
    for i in np.flatnonzero(others):
        y[:, i] = np.interp(rng.random(num_draws), cumulative[i], z) * scale[i]
    y[:, last] = -(y[:, others] @ loc[others]) / loc[last]
    squared = np.sum(y**2, axis=1)
    inside = np.minimum(squared, 4 * (1 - 1e-15))
    log_weight = (
        tilt * np.sum(y[:, others] ** 2, axis=1)
        + stats.t.logpdf(y[:, last] / scale[last], df)
        + exponent * np.log1p(-inside / 4)
    )
    log_weight = np.where(squared < 4, log_weight, -np.inf)
    largest = log_weight.max()
    weight = np.exp(log_weight - largest)
    log_mass = (
        np.log(total[others]).sum()
        + math.log(2 * math.pi * np.sum((loc * scale) ** 2)) / 2
        - math.log(scale[last] * abs(loc[last]))
        + largest
        + math.log(weight.mean())
    )
    return log_mass, weight.std() / weight.mean() / math.sqrt(num_draws)
