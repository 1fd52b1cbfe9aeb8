"""Checkpoints: bit-exact save and restore, with a checksum for every array.

`checkpoints/<step>/` holds the state (Orbax, each process writes its shards) and a JSON record of the run's progress.
Orbax writes in the background and renames a step's folder into place when it is complete. It restores flipped bits and
wrong dtypes without an error, so the record also holds the checksum, dtype and shape of every array. Checksums are
computed on the devices and do not depend on the sharding: a checkpoint can be restored on any mesh.
"""

import contextlib
import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from research import randomness
from research.errors import RecordError, UserError, as_out_of_memory_error, brief
from research.process import distributed
from research.record import storage
from research.training.checksums import checksums
from research.training.orbax_quirks import CheckpointManager, KeepNewestAndBest
from research.training.state import TrainState

_OPEN_RETRIES = 5  # for readers: the run may be deleting old checkpoints meanwhile


# Beginnings of errors that say nothing about the files: TensorStore, which reads the arrays, could not access them, or
# Python could not start a thread.
_READ_FAILURES = (
    *("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED"),
    "can't start new thread",
)


class _DamagedError(Exception):
    """A checkpoint differs from what was saved; the message says how."""


class _SetAsideError(UserError):
    """One of several processes found a damaged checkpoint and set it aside; the launcher restarts all processes."""

    exit_code = 143  # as after SIGTERM, which launchers retry


def _is_damage(error: Exception) -> bool:
    """Returns whether the error means that files are truncated, changed or missing, not that they could not be read."""
    if isinstance(error, OSError):
        return isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
    return not as_out_of_memory_error(error, "") and not str(error).startswith(_READ_FAILURES)


def _flat(state: TrainState) -> dict[str, Any]:
    """Returns the arrays of the state by path, such as "params.conv.kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def checksums_of(state: TrainState) -> dict[str, int]:
    """Returns the checksum of every array of a state, by path.

    Raises:
      ReplicaError: an array differs between devices that should hold the same.
    """
    return checksums(_flat(state))


def _kinds(arrays: dict[str, Any]) -> dict[str, str]:
    """Returns the dtype and shape of every array, such as "float32[3, 8]"."""
    return {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}


def _crc(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _orbax_path(folder: Path) -> Any:
    return epath.Path(str(folder)).resolve()


class Checkpoints:
    """The checkpoints of one workdir. As a context manager, it waits on exit for checkpoints being written.

    Args:
      workdir: the run's folder.
      keep: how many of the newest checkpoints to keep, in addition to the best one.
      message: called with a warning about each damaged checkpoint.
      read_only: change no file, so that a run can be inspected while it trains.
    """

    def __init__(self, workdir: Path, *, keep: int, message: Callable[[str], None], read_only: bool = False):
        place = workdir / "checkpoints"
        self._folder = _orbax_path(place)
        self._place = place
        self._message = message
        self._read_only = read_only
        self._best_step: int | None = None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=KeepNewestAndBest(keep, lambda: self._best_step),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        self._manager = self._open(options)

    def _open(self, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
        """Opens Orbax's manager; a reader retries, since the run may delete a checkpoint while its folder is read."""
        for _ in range(_OPEN_RETRIES if self._read_only else 0):
            try:
                return CheckpointManager(self._folder, item_names=("state", "record"), options=options)
            except (AttributeError, OSError):  # AttributeError: Orbax returns None for missing metadata
                time.sleep(0.2)
        return CheckpointManager(self._folder, item_names=("state", "record"), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        with storage.writing(self._place):
            self._manager.close()

    def save(self, state: TrainState, sums: dict[str, int], progress: dict[str, Any], best_step: int | None) -> None:
        """Saves a checkpoint in the background; the state may be donated as soon as this returns.

        Args:
          state: its step names the checkpoint; if that step is saved already, this does nothing.
          sums: `checksums_of(state)`.
          progress: the run's progress, as JSON values.
          best_step: the step of the best checkpoint, which is kept, or None.

        Raises:
          RecordError: this checkpoint, or the previous one, could not be written.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        arrays = _flat(state)
        record = {
            "progress": progress,
            "checksums": sums,
            "kinds": _kinds(arrays),
            "random_streams": randomness.VERSION,
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave({"crc32": _crc(record), **record})
        )
        self._best_step = best_step
        with storage.writing(f"checkpoint {step} or the one before in {self._place}"):
            self._manager.save(step, args=args)  # also raises if the previous one failed

    def wait(self) -> None:
        """Waits until everything saved is on disk.

        Raises:
          RecordError: a checkpoint could not be written.
        """
        with storage.writing(f"the newest checkpoint in {self._place}"):
            self._manager.wait_until_finished()

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints, intact or damaged, in ascending order."""
        return sorted(self._manager.all_steps()) if self._folder.exists() else []

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the newest intact checkpoint, or that of `step`.

        Damaged checkpoints are reported and, unless `read_only`, renamed to `checkpoints/damaged-<step>`.

        Args:
          like: the shapes, dtypes and shardings of the state to restore; if its carry is None, the carry is not read.
          step: the step of an existing checkpoint to restore, without falling back to another one.

        Returns:
          The state and its progress, or None if there is no checkpoint.

        Raises:
          UserError: all checkpoints are damaged, or the newest intact one has other arrays than `like`. Or only one of
            several processes found a checkpoint damaged (exit code 143, so that launchers restart all of them).
          RecordError, OutOfMemoryError: a checkpoint could not be read; it is left unchanged.
        """
        chosen, steps, reason = step, self.steps, ""
        for step in reversed(steps) if chosen is None else [chosen]:
            try:
                return self._restore(step, like)
            except (UserError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:  # Orbax passes on any error of its readers
                if "Gloo" in str(error):  # another process has ended: XLA raises this one as a ValueError
                    raise
                reason = brief(error)
                if not _is_damage(error):
                    raise as_out_of_memory_error(error) or RecordError(
                        f"checkpoint {step} in {self._place} could not be read ({reason}); it is unchanged: "
                        "fix the cause, and the same command resumes from it"
                    ) from error
                if chosen is not None:
                    # A run that is still training deletes old checkpoints.
                    state = f"is damaged ({reason})" if (self._folder / str(step)).exists() else "has been deleted"
                    raise UserError(
                        f"checkpoint {step} in {self._place} {state}: choose another by --checkpoint"
                    ) from None
                self._fall_back(step, reason, seen_by_all=isinstance(error, _DamagedError))
        if steps or (self._folder.exists() and any(self._folder.glob("damaged-*"))):
            raise UserError(
                f"no checkpoint in {self._place} can be restored ({reason or 'all were found damaged before'}): to "
                "start over, use another --workdir"
            )
        return None

    def read_record(self, step: int) -> dict[str, Any]:
        """Reads a checkpoint's record; any exception except `UserError` means that it is damaged or unreadable."""
        record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        if record.pop("crc32") != _crc(record):
            raise _DamagedError("its record's checksum differs")
        return record

    def read_arrays(self, step: int, shapes: dict[str, Any], sums: dict[str, int]) -> dict[str, jax.Array]:
        """Reads some arrays of a checkpoint; any exception means that it is damaged or unreadable.

        `shapes` are their `jax.ShapeDtypeStruct`s with shardings, `sums` the checksums in the record, by name.
        """
        state_args = ocp.args.StandardRestore(shapes)
        if len(shapes) < len(sums):
            restore_args = ocp.checkpoint_utils.construct_restore_args(shapes)
            state_args = ocp.args.PyTreeRestore(shapes, restore_args, partial_restore=True)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=state_args))["state"]
        for name, value in checksums(restored).items():
            if value != sums[name]:
                raise _DamagedError(f"the checksum of {name} differs")
        return restored

    def _restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        record = self.read_record(step)
        if record.get("random_streams") != randomness.VERSION:
            raise UserError(
                f"checkpoint {step} in {self._place} is from a version with other held-out examples and random "
                "numbers: use that version, or start over with another --workdir"
            )
        arrays = _flat(like)
        kinds, saved_kinds = _kinds(arrays), record["kinds"]
        if like.carry is None:
            saved_kinds = {name: kind for name, kind in saved_kinds.items() if name.partition(".")[0] != "carry"}
        for name in sorted(kinds.keys() | saved_kinds.keys()):
            has, wants = saved_kinds.get(name, "nothing"), kinds.get(name, "nothing")
            if has != wants:
                raise UserError(
                    f"checkpoint {step} in {self._place} is from another network or version ({name}: the checkpoint "
                    f"has {has}, this program {wants}): use the run's flags, or the version that wrote it"
                )
        shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for n, x in arrays.items()}
        restored = self.read_arrays(step, shapes, record["checksums"])
        # The state is donated, but Orbax's arrays may share their memory with others: copy them into XLA's own buffers.
        copies = [jnp.copy(restored.pop(name)) for name in arrays]
        return jax.tree.unflatten(jax.tree.structure(like), copies), record["progress"]

    def _fall_back(self, step: int, reason: str, *, seen_by_all: bool) -> None:
        """Reports a damaged checkpoint and sets it aside, so that the previous one can be restored.

        Raises:
          UserError: other processes may not have found the damage.
        """
        # A checksum mismatch is seen by every process; a missing file perhaps by this one only, while the others wait
        # for it inside Orbax. So this process cannot fall back by itself, and ends.
        is_local = jax.process_count() > 1 and not seen_by_all
        if is_local and self._read_only:
            raise UserError(
                f"checkpoint {step} in {self._place} is damaged ({reason}): resume the run, which sets it "
                "aside, or use a single process, which falls back to the previous checkpoint"
            ) from None
        self._message(f"checkpoint {step} is damaged ({reason}): falling back to the previous one")
        self._set_aside(step, is_local=is_local)
        if is_local:
            raise _SetAsideError(
                f"checkpoint {step} in {self._place} is damaged ({reason}) and was set aside: the same command "
                "resumes from the previous one"
            ) from None

    def _set_aside(self, step: int, *, is_local: bool) -> None:
        """Renames a damaged checkpoint; `is_local`: other processes may not know of it, so there is no barrier."""
        if self._read_only:
            return
        if is_local:
            with contextlib.suppress(FileNotFoundError):  # another process has renamed it
                self._rename(step)
            return
        if jax.process_index() == 0:
            self._rename(step)
        distributed.wait(f"checkpoint {step} is set aside")
        self._manager.reload()

    def _rename(self, step: int) -> None:
        aside = self._folder / f"damaged-{step}"
        while aside.exists():
            aside = aside.with_name(aside.name + "-")
        (self._folder / str(step)).rename(aside)
