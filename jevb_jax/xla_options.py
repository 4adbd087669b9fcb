"""How programs are compiled: kept for the next process, fast where they run once, in what precision."""

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax

from jevb_jax.paper.tracing import is_traced

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# LLVM's passes are most of the time that a CPU takes to compile. Other platforms name their options
# otherwise, and keep their defaults.
_QUICK_ON_CPU: dict[str, bool | int] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}

# XLA's library of CPU kernels, YNNPACK, is switched off (an empty list of what it may compute): its
# kernel gradients of convolutions take up to fifteen times as long as those of XLA without it, where a
# batch outgrows the cache; where it does not, a step loses a seventh at most. Forward passes gain too.
_WITHOUT_YNNPACK = {"xla_cpu_experimental_ynn_fusion_type": ""}


CACHE_VARIABLE = "JEVB_JAX_COMPILE_CACHE"
_MOST_CACHED_BYTES = 2**30

_logger = logging.getLogger(__name__)


def keep_compiled_programs() -> Path | None:
    """Keeps what JAX compiles in a directory of the user, where the next process finds it.

    The directory is `jevb_jax/compiled` in `$XDG_CACHE_HOME`, or in `~/.cache`. The environment's
    `JEVB_JAX_COMPILE_CACHE` names another one, or is `off`. Where JAX has been given a cache of its own
    (`JAX_COMPILATION_CACHE_DIR`, or an earlier call), nothing is changed; nor where several processes
    train together, of which the first alone would write, unless a directory is named. JAX names a
    program by its code, its options, its own version and the device, so that processes can share the
    directory. One that reads what another has half written compiles again; of a file that stays so,
    after a full disk, JAX warns until it is deleted. Empty files, and once the directory holds more
    than a gigabyte those that were not read for longest, are deleted here.

    Returns:
      The directory, or None: switched off, JAX's own, several processes, or one that cannot be
      written, which is warned of.
    """
    settings: Any = jax.config  # whose names type checkers do not know
    if settings.jax_compilation_cache_dir is not None:
        return None
    asked = os.environ.get(CACHE_VARIABLE, "")
    if asked.lower() == "off":
        return None
    if not asked and jax.distributed.is_initialized() and jax.process_count() > 1:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    directory = Path(asked or f"{home}/jevb_jax/compiled")
    try:
        directory = directory.expanduser()
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(f"{directory} cannot be written")
        _delete_oldest(directory, _MOST_CACHED_BYTES)
    except (OSError, RuntimeError) as error:  # no home directory is a RuntimeError
        _logger.warning(
            "Compiled programs are not kept for the next process: %s. %s names another directory, or "
            "is 'off'.",
            error,
            CACHE_VARIABLE,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # A run compiles a hundred programs, most of them in less than JAX's own limit of a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return directory


def _delete_oldest(directory: Path, most_bytes: int) -> None:
    """Deletes empty files, and those not read for longest until the rest is small enough."""
    files: list[tuple[float, int, str]] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # another process deleted it
                if entry.is_file(follow_symlinks=False):
                    found = entry.stat(follow_symlinks=False)
                    # File systems renew the time of reading once a day at least, or never.
                    files.append((max(found.st_atime, found.st_mtime), found.st_size, entry.path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        # Empty is what a kill between opening and writing leaves, and JAX never writes it again.
        if not size or total > most_bytes:
            Path(path).unlink(missing_ok=True)
            total -= size


def alone_on_a_cpu() -> bool:
    """Whether one CPU device is all there is."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


@functools.cache
def _knows(name: str, value: str) -> bool:
    """Whether this version of XLA has an option of the compiler."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


def network_options() -> dict[str, str]:
    """`compiler_options` of `jax.jit` with which networks are fast, their gradients above all.

    On one CPU device. By how much of the last cache a batch takes, a training step of ResNet-18 with the
    CIFAR stem takes 0.44 to 1.14 of the time, and a third less memory, its forward pass alone 0.6 to 1.0
    (`benchmarks/README.md`). Numbers change by rounding.

    Returns:
      Options that this version of XLA knows; none on other platforms, nor on several CPU devices: those
      simulate a pod, and one process of them computes what two do. Only for the outermost
      `jit`: JAX refuses options inside another one.
    """
    if not alone_on_a_cpu():
        return {}
    return {name: value for name, value in _WITHOUT_YNNPACK.items() if _knows(name, value)}


def in_single_precision(
    function: Callable[_Arguments, _Result],
) -> Callable[_Arguments, _Result]:
    """Computes in float32 and int32, as JAX does by itself, where the process asked for 64 bits.

    Networks are trained in float32. In a process with `jax_enable_x64`, states would have other types
    than those that were saved, and samples other bits.

    Args:
      function: no generator, which would run in the caller's precision.

    Returns:
      The function.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Entered only where it changes something: programs that were compiled stay as they are.
        settings: Any = jax.config  # whose names type checkers do not know
        if not settings.jax_enable_x64:
            return function(*args, **kwargs)
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return call


def jit_once(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """`jax.jit` for a program that runs once: on a CPU it is compiled fast and not to be fast.

    Args:
      function: takes arrays; static values belong in its closure.

    Returns:
      The compiled function; inside another one, or under `jax.eval_shape`, it is `jax.jit`'s. Its
      numbers differ from those of `jax.jit` by rounding, as those of any two compilations may.
    """
    plain = jax.jit(function)
    quick = jax.jit(function, compiler_options=_QUICK_ON_CPU)

    def call(*args: Any, **kwargs: Any) -> Any:
        is_plain = is_traced(args, kwargs) or jax.default_backend() != "cpu"
        return (plain if is_plain else quick)(*args, **kwargs)

    return call
