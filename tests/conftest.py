"""Strict settings, where pytest sees them: eight simulated devices, no implicit rank promotion."""

import os

# Before JAX starts: the suite must not depend on an accelerator of the machine it runs on.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
