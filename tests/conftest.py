"""Strict settings, where pytest sees them: eight simulated devices, no implicit rank promotion."""

import os

# Before JAX starts: the suite must not depend on an accelerator of the machine it runs on.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Most of the suite's time is compiling, and hardly any of it is running; XLA's older code generator is
# the quicker one at that. Processes that tests start inherit it. What users run, the optimised program,
# is tested by the runs of train.py in `test_runner`, and where `optimised` asks for it.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def optimised():
    """Compiles with XLA's optimisations."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
