"""Checkpoints of state and settings by Orbax. Reading is strict and verifies every bit.

If the latest checkpoint is damaged, the one before it is read. A checkpoint holds the state as a
flat mapping from names to arrays, and one JSON file: the step (which alone gives the position in
the data), the complete config with its hash, and a fingerprint of every array.
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

from jevb_jax.runs import access_errors, files
from jevb_jax.runs.array_names import differences, flatten_names, unflatten_names
from jevb_jax.runs.dotted_keys import flatten

State = TypeVar("State")
_FORMAT = 1
_logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written."""


class CheckpointMismatchError(CheckpointError):
    """The checkpoint is undamaged, but of another model."""


class CheckpointAccessError(CheckpointError):
    """The checkpoint may be undamaged, but could not be reached or did not fit into memory."""


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a complete config."""
    return files.json_sha256(config)


def changed_keys(
    saved: Mapping[str, Any], current: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configs differ.

    Args:
      saved: the config of the run.
      current: the requested config.

    Returns:
      `{dotted key: (saved, current)}`, with "(absent)" for a config that lacks the key.
    """
    a, b = flatten(saved), flatten(current)
    absent = "(absent)"
    return {
        key: (a.get(key, absent), b.get(key, absent))
        for key in sorted(a.keys() | b.keys())
        if a.get(key, absent) != b.get(key, absent)
    }


def saved_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in a directory, rising, read from names alone.

    Args:
      directory: where a `Checkpointer` saves; it need not exist.
    """
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.exists() else []


@jax.jit
def _fingerprints(flat: dict[str, Array]) -> dict[str, Array]:
    def fingerprint(leaf: Array) -> Array:
        unsigned = jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")
        words = jax.lax.bitcast_convert_type(leaf, unsigned).reshape(-1).astype(jnp.uint32)
        # The last steps of MurmurHash3 are a bijection of a word. Each word is first mixed with its
        # position. So a change of one word always changes the sum, and an exchange almost always.
        mixed = words + jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(0x9E3779B9)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)

    return {name: fingerprint(leaf) for name, leaf in flat.items()}


def fingerprint(tree: Any) -> dict[str, int]:
    """Sums of the bits of every leaf, 32 bits each, computed on the device.

    Args:
      tree: a pytree of arrays.

    Returns:
      `{name: sum}`. Equal trees have equal sums. A change of one word always changes a sum.
    """
    return {name: int(value) for name, value in _fingerprints(flatten_names(tree)).items()}


def _field(name: str) -> str:
    """The field of the state that an array belongs to, for example `params`."""
    return name.partition(".")[0]


def _check_same_structure(saved: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointMismatchError with all missing, extra and differently shaped arrays."""
    problems = differences(saved, wanted, where="checkpoint")
    if problems:
        raise CheckpointMismatchError(
            f"{where} does not fit the model:\n" + "\n".join(problems) + "\n"
            "Use the config that the run was made with (config.json in its directory)."
        )


def _link_without_patterns(directory: Path) -> tempfile.TemporaryDirectory[str] | None:
    """A temporary directory with a link `checkpoints`, if the path of the directory is a pattern.

    Orbax looks for its own files by `glob` with the whole path. Under a directory like
    `sweep[lr=0.1]` it would find none, and write checkpoints that cannot be read.
    """
    if files.is_remote(directory) or not any(sign in str(directory) for sign in "*?["):
        return None
    directory.mkdir(parents=True, exist_ok=True)
    above = tempfile.TemporaryDirectory(prefix="jevb_jax_link_", ignore_cleanup_errors=True)
    (Path(above.name) / "checkpoints").symlink_to(directory, target_is_directory=True)
    return above


class Checkpointer:
    """Saves and restores the state of a run in `directory`, asynchronously.

    It keeps the latest `keep_latest` checkpoints, and the `keep_best` best ones by the score given
    to `save`.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_latest: int = 2,
        keep_best: int = 0,
        keep_steps: Sequence[int] = (),
    ):
        """Opens or creates the directory.

        Args:
          directory: directory of all checkpoints; each step has a subdirectory.
          keep_latest: number of latest checkpoints to keep, at least 1. With 2 or more, a damaged
            checkpoint has a predecessor.
          keep_best: number of best checkpoints to keep in addition.
          keep_steps: steps that are always kept, for example the end of a run that was extended.

        Raises:
          ValueError: `keep_latest < 1` or `keep_best < 0`.
        """
        if keep_latest < 1 or keep_best < 0:
            raise ValueError(
                "checkpoint.keep_latest must be at least 1 and keep_best at least 0, "
                f"got {keep_latest} and {keep_best}"
            )
        # `best_fn` with `max_to_keep` would delete the latest checkpoint; these policies do not.
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
            # Named here, because otherwise a process that has not saved could not read.
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
        """Steps of the complete checkpoints, rising."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Step of the best checkpoint, or None if no checkpoint has a score."""
        return self._manager.best_step() if self._keep_best else None

    def save(
        self, step: int, state: Any, *, config: Mapping[str, Any], score: float | None = None
    ) -> None:
        """Starts to save, and returns as soon as the state may be overwritten.

        Args:
          step: number of training steps done.
          state: pytree of arrays.
          config: complete config, as JSON values.
          score: larger is better. Required if `keep_best` is above zero.

        Raises:
          CheckpointError: this save or an earlier one failed.
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

    def restore(self, step: int, template: State, *, is_whole: bool = True) -> State:
        """Restores one checkpoint, strictly.

        Args:
          step: one of `steps()`.
          template: a state of the wanted structure, of arrays or `jax.ShapeDtypeStruct`s.
          is_whole: False if the template holds only some fields of the saved state, and None for the
            others. Other fields are not read, so they may be anything.

        Raises:
          CheckpointMismatchError: arrays are missing, extra, or of another shape or type. The
            message lists all of them.
          CheckpointAccessError: the storage could not be reached, refused, or the memory is
            exhausted.
          CheckpointError: the checkpoint cannot be read, or some array has other bits than those
            that were saved.
        """
        try:
            return self._restore(step, template, is_whole)
        except CheckpointError:
            raise
        # Orbax, TensorStore and JSON raise many kinds of errors for damaged files.
        except Exception as error:
            if access_errors.is_of_access(error):
                raise CheckpointAccessError(
                    f"checkpoint {step} in {self._directory} could not be read "
                    f"({type(error).__name__}: {error}). Nothing says that it is damaged, and "
                    "nothing was changed. Run the same command when it can be reached"
                ) from error
            raise CheckpointError(
                f"checkpoint {step} cannot be read ({type(error).__name__}: {error})"
            ) from error

    def _restore(self, step: int, template: State, is_whole: bool) -> State:
        where = f"checkpoint {step}"
        meta = self.read_meta(step)
        if meta.get("format") != _FORMAT:
            raise CheckpointError(
                f"{where} has format {meta.get('format')!r}, this version reads {_FORMAT}"
            )
        wanted = flatten_names(template)
        saved_names = dict.fromkeys(meta["fingerprint"])
        metadata = self._manager.item_metadata(step)["state"]
        fields = {_field(name) for name in wanted}
        saved = {name: metadata[name] for name in saved_names if is_whole or _field(name) in fields}
        _check_same_structure(saved, wanted, where)
        abstract = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None)
            )
            for name, leaf in wanted.items()
        }
        restored = self._read(step, abstract) if is_whole else self._read_part(step, abstract)
        found = fingerprint(restored)
        damaged = [name for name in wanted if found[name] != meta["fingerprint"][name]]
        if damaged:
            raise CheckpointError(
                f"{where} is damaged: {len(damaged)} arrays have other bits than those saved, the "
                f"first are {damaged[:5]}"
            )
        return unflatten_names(restored, template)

    def _read(self, step: int, abstract: dict[str, Any]) -> dict[str, Array]:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))  # pyright: ignore[reportCallIssue]
        return self._manager.restore(step, args=args)["state"]

    def _read_part(self, step: int, abstract: dict[str, Any]) -> dict[str, Array]:
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(
                self._manager.directory / str(step) / "state",
                args=ocp.args.PyTreeRestore(  # pyright: ignore[reportCallIssue]
                    abstract,
                    restore_args=restore_args,
                    partial_restore=True,
                ),
            )

    def restore_latest(self, template: State, *, is_whole: bool = True) -> tuple[int, State] | None:
        """Restores the latest undamaged checkpoint. Logs a warning for each damaged one.

        Args:
          template: a state of the wanted structure, of arrays or `jax.ShapeDtypeStruct`s.
          is_whole: as for `restore`.

        Returns:
          Step and state, or None if there are no checkpoints.

        Raises:
          CheckpointMismatchError: the checkpoint is undamaged, but of another model.
          CheckpointAccessError: as for `restore`. An older checkpoint is no answer to this: the
            run would go on from it and delete the newer ones.
          CheckpointError: all checkpoints are damaged.
        """
        failures: list[str] = []
        for step in reversed(self.steps()):
            try:
                state = self.restore(step, template, is_whole=is_whole)
            except (CheckpointMismatchError, CheckpointAccessError):
                raise
            except CheckpointError as error:
                failures.append(str(error))
                _logger.warning(
                    "%s; falling back to the one before it.", str(error).splitlines()[0]
                )
            else:
                return step, state
        if failures:
            raise CheckpointError(
                "no checkpoint can be read:\n  " + "\n  ".join(failures) + "\n"
                "Move the directory away to start the run again."
            )
        return None

    def discard_after(self, step: int) -> None:
        """Deletes checkpoints after `step`. Damaged ones would prevent a save at the same step."""
        for newer in self.steps():
            if newer > step:
                self._manager.delete(newer)

    def wait(self) -> None:
        """Waits until every save is on disk.

        Raises:
          CheckpointError: a save failed.
        """
        with self._failures_named():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for all saves, and frees the manager. Errors are those of `wait`."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if self._link is not None:
                self._link.cleanup()

    @contextlib.contextmanager
    def _failures_named(self) -> Iterator[None]:
        # A full disk raises OSError, ValueError or an XLA error, depending on what was writing.
        try:
            yield
        except Exception as error:
            raise CheckpointError(
                f"a checkpoint could not be saved ({type(error).__name__}: {error}). The checkpoints of "
                f"steps {self.steps()} in {self._directory} are complete. When there is space and "
                "permission to write there, the same command continues from the last."
            ) from error
