"""Checkpoints: state and settings through Orbax; strict, verified, with a predecessor to fall back on.

A checkpoint holds the state as a flat mapping of names to arrays and one JSON: the step (which alone
is the position in the data), the resolved config with its hash, and a fingerprint of every array.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array
from orbax.checkpoint import checkpoint_managers

from jevb_jax.runs import files
from jevb_jax.runs.array_names import differences, flatten_names, unflatten_names

State = TypeVar("State")
_FORMAT = 1
_logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used."""


class CheckpointMismatchError(CheckpointError):
    """A whole checkpoint of another model."""


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a resolved config."""
    return files.json_sha256(config)


def changed_keys(
    saved: Mapping[str, Any], current: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Compares two configs, as nested JSON mappings.

    Args:
      saved: the config of the run.
      current: the config asked for.

    Returns:
      `{dotted key: (saved, current)}` of those that differ; "(absent)" where one lacks the key.
    """

    def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in config.items():
            if isinstance(value, Mapping):
                flat.update(flatten(value, f"{prefix}{key}."))
            else:
                flat[prefix + key] = value
        return flat

    a, b = flatten(saved), flatten(current)
    absent = "(absent)"
    return {
        key: (a.get(key, absent), b.get(key, absent))
        for key in sorted(a.keys() | b.keys())
        if a.get(key, absent) != b.get(key, absent)
    }


def saved_steps(directory: Path) -> list[int]:
    """Steps of whole checkpoints, ascending, by the names of a directory alone.

    Args:
      directory: where a `Checkpointer` saves; may not exist.

    Returns:
      The steps.
    """
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.exists() else []


@jax.jit
def _fingerprints(flat: dict[str, Array]) -> dict[str, Array]:
    def fingerprint(leaf: Array) -> Array:
        unsigned = jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")
        words = jax.lax.bitcast_convert_type(leaf, unsigned).reshape(-1).astype(jnp.uint32)
        # The finaliser of MurmurHash3 is a bijection of a word, mixed with its place before: a change
        # of any one word changes the sum, and an exchange of words almost always does.
        mixed = words + jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(0x9E3779B9)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

    return {name: fingerprint(leaf) for name, leaf in flat.items()}


def fingerprint(tree: Any) -> dict[str, int]:
    """A 32-bit sum of every leaf's bits, computed on the device.

    Args:
      tree: a pytree of arrays.

    Returns:
      `{name: sum}`. Equal trees have equal sums; one changed word always changes its leaf's sum.
    """
    return {name: int(value) for name, value in _fingerprints(flatten_names(tree)).items()}


def _check_same_structure(saved: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointMismatchError listing every missing, extra and differently shaped array."""
    problems = differences(saved, wanted, where="checkpoint")
    if problems:
        raise CheckpointMismatchError(
            f"{where} does not fit the model:\n" + "\n".join(problems) + "\n"
            "Use the config that the run was made with (config.json in its directory)."
        )


def _link_without_patterns(directory: Path) -> tempfile.TemporaryDirectory[str] | None:
    """A temporary directory with the link `checkpoints`, where the directory's own name is a pattern.

    Orbax looks for its own parts by `glob` of the whole path: under a directory called `sweep[lr=0.1]`
    it finds none, and writes checkpoints that cannot be read.
    """
    if files.is_remote(directory) or not any(sign in str(directory) for sign in "*?["):
        return None
    directory.mkdir(parents=True, exist_ok=True)
    above = tempfile.TemporaryDirectory(prefix="jevb_jax_link_", ignore_cleanup_errors=True)
    (Path(above.name) / "checkpoints").symlink_to(directory, target_is_directory=True)
    return above


class Checkpointer:
    """Saves and restores a run's state in `directory`, asynchronously.

    Keeps the latest `keep_latest` checkpoints and, if `keep_best` is above zero, as many of the best
    by the metric given to `save`.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_latest: int = 2,
        keep_best: int = 0,
        keep_steps: Sequence[int] = (),
    ):
        """Opens or makes the directory.

        Args:
          directory: where checkpoints live, one subdirectory a step.
          keep_latest: number of most recent checkpoints kept, at least 1; 2 or more leave a
            predecessor to a damaged one.
          keep_best: number of best checkpoints kept beside them.
          keep_steps: steps kept in any case, such as the end of a run before it was extended.

        Raises:
          ValueError: `keep_latest < 1` or `keep_best < 0`.
        """
        if keep_latest < 1 or keep_best < 0:
            raise ValueError(
                "checkpoint.keep_latest must be at least 1 and keep_best at least 0, "
                f"got {keep_latest} and {keep_best}"
            )
        # `best_fn` with `max_to_keep` would delete the latest checkpoint; the policies do not.
        policies: list[Any] = [checkpoint_managers.LatestN(n=keep_latest)]
        if keep_best:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics["score"], n=keep_best, reverse=False
                )
            )
        if keep_steps:
            policies.append(checkpoint_managers.CustomSteps(steps=keep_steps))
        self._keep_best = keep_best
        self._directory = files.to_path(directory)
        self._link = _link_without_patterns(self._directory)
        self._manager = ocp.CheckpointManager(
            self._directory if self._link is None else Path(self._link.name) / "checkpoints",
            # Named here, or a process that has not saved could not read.
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                best_fn=(lambda metrics: metrics["score"]) if keep_best else None,
                best_mode="max",
                create=True,
                enable_async_checkpointing=True,
            ),
        )

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Step of the best checkpoint, or None when none has a score."""
        return self._manager.best_step() if self._keep_best else None

    def save(
        self, step: int, state: Any, *, config: Mapping[str, Any], score: float | None = None
    ) -> None:
        """Starts saving; returns once the state may be overwritten.

        Args:
          step: number of steps done.
          state: pytree of arrays.
          config: resolved config, JSON values.
          score: larger is better; required when `keep_best` is above zero.

        Raises:
          CheckpointError: this save, or one started before, failed.
        """
        if step in self._manager.all_steps():
            return
        meta = {
            "format": _FORMAT,
            "step": step,
            "config": dict(config),
            "config_hash": config_hash(config),
            "fingerprint": fingerprint(state),
        }
        with self._failures_named():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(flatten_names(state)),  # pyright: ignore[reportCallIssue]
                    meta=ocp.args.JsonSave(meta),  # pyright: ignore[reportCallIssue]
                ),
                metrics={"score": score} if self._keep_best else None,
            )

    def read_meta(self, step: int) -> dict[str, Any]:
        """The JSON of a checkpoint: format, step, config, config_hash, fingerprint."""
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(meta=ocp.args.JsonRestore()),  # pyright: ignore[reportCallIssue]
        )
        return restored["meta"]

    def restore(self, step: int, template: State) -> State:
        """Restores one checkpoint, strictly.

        Args:
          step: one of `steps()`.
          template: a state of the wanted structure, arrays or `jax.ShapeDtypeStruct`s.

        Returns:
          The state.

        Raises:
          CheckpointMismatchError: arrays are missing, extra or of another shape or type; all are
            listed.
          CheckpointError: the bits of some array are not those that were saved.
        """
        where = f"checkpoint {step}"
        meta = self.read_meta(step)
        if meta.get("format") != _FORMAT:
            raise CheckpointError(
                f"{where} has format {meta.get('format')!r}, this version reads {_FORMAT}"
            )
        wanted = flatten_names(template)
        saved_names = dict.fromkeys(meta["fingerprint"])
        metadata = self._manager.item_metadata(step)["state"]
        saved = {name: metadata[name] for name in saved_names}
        _check_same_structure(saved, wanted, where)
        abstract = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None)
            )
            for name, leaf in wanted.items()
        }
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)),  # pyright: ignore[reportCallIssue]
        )["state"]
        found = fingerprint(restored)
        damaged = [name for name in wanted if found[name] != meta["fingerprint"][name]]
        if damaged:
            raise CheckpointError(
                f"{where} is damaged: the bits of {len(damaged)} arrays differ from those saved, "
                f"first {damaged[:5]}"
            )
        return unflatten_names(restored, template)

    def restore_latest(self, template: State) -> tuple[int, State] | None:
        """Restores the newest checkpoint that is whole, warning of every damaged one it passes.

        Args:
          template: see `restore`.

        Returns:
          Its step and state, or None when there is no checkpoint at all.

        Raises:
          CheckpointMismatchError: the checkpoint is whole and of another model.
          CheckpointError: all checkpoints are damaged.
        """
        failures: list[str] = []
        for step in reversed(self.steps()):
            try:
                state = self.restore(step, template)
            except CheckpointMismatchError:
                raise
            # Whatever Orbax, TensorStore or JSON raise on damaged files, the answer is the same.
            except Exception as error:  # noqa: BLE001
                failures.append(f"checkpoint {step}: {type(error).__name__}: {error}")
                _logger.warning(
                    "Checkpoint %d cannot be read (%s: %s); falling back to the one before it.",
                    step,
                    type(error).__name__,
                    str(error).splitlines()[0] if str(error) else "",
                )
            else:
                return step, state
        if failures:
            raise CheckpointError(
                "no checkpoint can be read:\n  " + "\n  ".join(failures) + "\n"
                "Move the directory away to start the run anew."
            )
        return None

    def discard_after(self, step: int) -> None:
        """Deletes checkpoints newer than `step`: damaged ones that would stand in the way of a save."""
        for newer in self.steps():
            if newer > step:
                self._manager.delete(newer)

    def wait(self) -> None:
        """Blocks until every started save is on disk.

        Raises:
          CheckpointError: one of them failed.
        """
        with self._failures_named():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves, as `wait`, and frees the manager."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if self._link is not None:
                self._link.cleanup()

    @contextlib.contextmanager
    def _failures_named(self) -> Iterator[None]:
        # A full disk is an OSError, a ValueError or an error of XLA, after who came upon it.
        try:
            yield
        except Exception as error:
            raise CheckpointError(
                f"a checkpoint could not be saved ({type(error).__name__}: {error}); those of steps "
                f"{self.steps()} in {self._directory} are whole. Once there is room and leave "
                "to write there, the same command goes on from the last."
            ) from error
