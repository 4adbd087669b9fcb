"""Options of compilation: a cache for later processes, speed, and precision."""

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
Option = bool | int | str

# On a CPU most compile time is spent in LLVM's passes. XLA's older generator of fused loops gives
# LLVM less code: together they compile the objective's gradient in 0.3 of the time. Other platforms
# have other options and keep their defaults.
_QUICK_ON_CPU: dict[str, Option] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}

# Switches off YNNPACK, XLA's library of CPU kernels (the list of what it may compute is empty). If
# a batch does not fit into the cache, its kernel gradients of convolutions take up to fifteen times
# as long as those of plain XLA. If it fits, a step is at most a seventh slower without YNNPACK.
# Forward passes become faster too.
_WITHOUT_YNNPACK: dict[str, Option] = {"xla_cpu_experimental_ynn_fusion_type": ""}


CACHE_VARIABLE = "JEVB_JAX_COMPILE_CACHE"
_MOST_CACHED_BYTES = 2**30

_logger = logging.getLogger(__name__)


def keep_compiled_programs() -> Path | None:
    """Keeps compiled programs in a directory of the user, where later processes find them.

    The directory is `jevb_jax/compiled` in `$XDG_CACHE_HOME`, or in `~/.cache`. The environment
    variable `JEVB_JAX_COMPILE_CACHE` names another directory, or is `off`. Nothing is changed if
    JAX already has a cache (`JAX_COMPILATION_CACHE_DIR`, or an earlier call), or if several
    processes train together and no directory is named, because only the first of them would write.

    JAX names a program by its code, its options, JAX's version and the device, so processes can
    share the directory. A process that reads a half-written file compiles again. If a file stays
    half-written, after a full disk, JAX warns until it is deleted. This function deletes empty
    files. If the directory holds more than a gigabyte, it also deletes the files that were not read
    for the longest time.

    Returns:
      The directory. None if the cache is switched off, is JAX's own, or cannot be written (with a
      warning), or if several processes train together.
    """
    settings: Any = jax.config  # type checkers do not know its names
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
            "Compiled programs are not kept for later processes: %s. %s can name another directory, or "
            "be 'off'.",
            error,
            CACHE_VARIABLE,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # A run compiles a hundred programs, most of them faster than JAX's own limit of a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return directory


def _delete_oldest(directory: Path, most_bytes: int) -> None:
    """Deletes empty files, and the files not read for the longest time, down to a total size."""
    files: list[tuple[float, int, str]] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # another process deleted it
                if entry.is_file(follow_symlinks=False):
                    found = entry.stat(follow_symlinks=False)
                    # File systems update the access time at least once a day, or never.
                    files.append((max(found.st_atime, found.st_mtime), found.st_size, entry.path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        # A kill between opening and writing leaves an empty file, which JAX never writes again.
        if not size or total > most_bytes:
            Path(path).unlink(missing_ok=True)
            total -= size


def alone_on_a_cpu() -> bool:
    """Whether the only device is one CPU device."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


@functools.cache
def _knows(name: str, value: Option) -> bool:
    """Whether this version of XLA has an option of the compiler."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


def network_options() -> dict[str, Option]:
    """`compiler_options` of `jax.jit` that make networks faster on a CPU, mostly their gradients.

    They are for one CPU device. There a training step of ResNet-18 with the CIFAR stem takes 0.44
    to 1.14 of the time and a third less memory; its forward pass alone takes 0.6 to 1.0 of the
    time. The gain depends on how much of the last cache a batch needs (`benchmarks/README.md`).
    Numbers change by rounding.

    Returns:
      Options that this version of XLA has. None on other platforms, and none for several CPU
      devices, which simulate a pod: there one process must compute the same as two processes do.
      Pass them only to the outermost `jit`, because JAX refuses options inside another one.
    """
    return _known(_WITHOUT_YNNPACK) if alone_on_a_cpu() else {}


def _known(options: dict[str, Option]) -> dict[str, Option]:
    """The options that this version of XLA has."""
    return {name: value for name, value in options.items() if _knows(name, value)}


def in_single_precision(
    function: Callable[_Arguments, _Result],
) -> Callable[_Arguments, _Result]:
    """Makes a function compute in float32 and int32, even if the process has enabled 64 bits.

    Networks are trained in float32. With `jax_enable_x64`, states would have other types than those
    saved, and random samples other bits.

    Args:
      function: not a generator, because that would run in the precision of its caller.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Only enter the context if it changes something, so that compiled programs stay valid.
        settings: Any = jax.config  # type checkers do not know its names
        if not settings.jax_enable_x64:
            return function(*args, **kwargs)
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return call


def jit_once(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """`jax.jit` for a program that runs seldom: on a CPU it compiles fast, but it is slower.

    Inside another `jit`, or under `jax.eval_shape`, it is the same as `jax.jit`. As with any two
    compilations, results may differ from those of `jax.jit` by rounding.

    Args:
      function: takes arrays; static values belong in its closure.
    """
    plain = jax.jit(function)

    # Made at the first call, because an import must not start the backend.
    @functools.cache
    def quick() -> Callable[_Arguments, _Result]:
        return jax.jit(function, compiler_options=_known(_QUICK_ON_CPU))

    def call(*args: Any, **kwargs: Any) -> Any:
        is_plain = is_traced(args, kwargs) or jax.default_backend() != "cpu"
        return (plain if is_plain else quick())(*args, **kwargs)

    return call
