"""Strict settings, where pytest sees them: eight simulated devices, no implicit rank promotion."""

import os

# Before JAX starts: the suite must not depend on an accelerator of the machine it runs on.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    # Most of the default suite's time is compiling, and hardly any of it is running. The slow
    # suite, and `-m ''`, run what users run: the optimised program.
    jax.config.update("jax_disable_most_optimizations", config.getoption("markexpr") == "not slow")


@pytest.fixture
def quick_compilation():
    """For slow tests whose steps take a hundredth of a second, and half a minute to optimise."""
    previous = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", previous)
