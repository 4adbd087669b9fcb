"""Strict settings, where pytest sees them: eight simulated devices, no implicit rank promotion."""

import gc
import importlib.metadata
import os
import tempfile

# Before JAX starts: the suite must not depend on an accelerator of the machine it runs on.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Most of the suite's time is compiling, and hardly any of it is running. So tests compile without most
# optimizations, with XLA's older code generator, which is quicker, and each program in one piece: the
# cores are busy with other tests. Processes that tests start inherit this, unless they add
# `AS_USERS_RUN_IT`. `JEVB_JAX_TESTS=optimized pytest -m numerics` tests what depends on rounding in
# the programs that users run.
if os.environ.get("JEVB_JAX_TESTS") != "optimized":
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    # Newer versions of XLA may have lost these options, and an unknown option ends the process.
    if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 12):
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
            " --xla_cpu_parallel_codegen_split_count=1"
        )

# The matrices of tests are small. OpenBLAS and OpenMP would start all threads for each, in every worker,
# and these then wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What one test compiled, others read: on every worker and in the processes that tests start. Workers
# inherit the directory from pytest's own process, which deletes it at its end.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="jevb_jax_compiled_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

# Of a process's environment.
AS_USERS_RUN_IT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "false", "XLA_FLAGS": ""}

# Traced programs are millions of objects that live on. Looking through them for garbage took a
# sixteenth of the suite's time.
gc.set_threshold(50_000, 20, 20)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption(
        "--differences",
        metavar="FILE",
        help="write how far published protocols are from their references; needs -n 0",
    )


def pytest_configure(config):
    if config.getoption("--differences") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--differences needs one process: add -n 0")


def pytest_collection_modifyitems(items):
    """What may take longest starts first. At the end, one worker would be busy with it alone."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


@pytest.fixture
def optimized():
    """Compiles with XLA's optimizations, whatever the rest of the suite does."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def strict_dtypes():
    """No implicit promotion of types."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def float64():
    """A process of 64 bits."""
    with jax.enable_x64(True):
        yield
