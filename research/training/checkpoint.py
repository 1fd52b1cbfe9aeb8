"""Checkpoints: what a run needs to go on, exact to the bit, and the proof that it is.

`checkpoints/<step>/` holds the state (Orbax, each process writes its shards) and a JSON record of the run's progress.
Orbax writes in the background and renames a step's folder into place when it is whole. It restores flipped bits and
other dtypes without a word, so the record also holds a checksum, dtype and shape of every array. Checksums are computed
on the devices, and are the same for any sharding: a checkpoint can be restored on any mesh.
"""

import contextlib
import json
import logging
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from research import randomness
from research.errors import RecordError, UserError, as_out_of_memory_error
from research.process import distributed
from research.record import storage
from research.training.checksums import checksums
from research.training.state import TrainState

_OPEN_RETRIES = 5  # of a folder whose checkpoints a run may be deleting meanwhile


def _drop_orbax_duplicates(record: logging.LogRecord) -> bool:
    """A logging filter: drops Orbax's log lines of errors that it also raises, in the background or a moment later."""
    told = record.exc_info or str(record.msg).startswith("Metadata file does not exist")
    return not (told and "orbax" in record.pathname)


logging.getLogger("absl").addFilter(_drop_orbax_duplicates)

_unraisable = sys.unraisablehook


def _except_late(found: Any) -> None:
    """Leaves out what TensorStore's threads print when the first of several failed writes has closed Orbax's loop."""
    if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
        _unraisable(found)


sys.unraisablehook = _except_late


# Of TensorStore, which reads the arrays, and of Python: nothing is said of the files by these.
_UNREAD = (
    *("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED"),
    "can't start new thread",
)


class _DamagedError(Exception):
    """This checkpoint is not what was saved; the text says why."""


class _SetAsideError(UserError):
    """One of several processes met a damaged checkpoint, which is out of the way now: launchers start all again."""

    exit_code = 143


def _is_damage(error: Exception) -> bool:
    """Whether it says of a checkpoint's files that they are cut, changed or gone, not that they could not be read."""
    if isinstance(error, OSError):
        return isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
    return not as_out_of_memory_error(error, "") and not str(error).startswith(_UNREAD)


def _flat(state: TrainState) -> dict[str, Any]:
    """The arrays of the state by path: "params.conv.kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def checksums_of(state: TrainState) -> dict[str, int]:
    """The checksum of every array of a state.

    Raises:
      ReplicaError: an array differs between devices that should hold the same.
    """
    return checksums(_flat(state))


def _kinds(arrays: dict[str, Any]) -> dict[str, str]:
    return {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}


def _crc(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _orbax_path(folder: Path) -> Any:
    return epath.Path(str(folder)).resolve()


class _Kept(preservation_policy.PreservationPolicy):
    """The newest checkpoints, and the best."""

    def __init__(self, newest: int, best_step: Callable[[], int | None]):
        self._newest = newest
        self._best_step = best_step

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        first = len(checkpoints) - self._newest
        return [i >= first or info.step == self._best_step() for i, info in enumerate(checkpoints)]


class _Manager(ocp.CheckpointManager):
    """Orbax's, which leaves jax's agreement on where to stop to `distributed.asked_to_stop`."""

    def reached_preemption(self, step: int) -> bool:
        # jax agrees on the number after the last that it was asked about. Orbax asks with steps, the run with its
        # calls: a signal that came between Orbax's question and the run's would stop at a call that never comes.
        return False


class Checkpoints:
    """The checkpoints of one workdir. A context manager: leaving it waits for what is being written.

    Args:
      workdir: the run's folder.
      keep: how many of the newest are kept, beside the best.
      message: gets the line that names a damaged checkpoint.
      read_only: nothing is changed, so that a run may be looked at while it trains.
    """

    def __init__(self, workdir: Path, *, keep: int, message: Callable[[str], None], read_only: bool = False):
        place = workdir / "checkpoints"
        self._folder = _orbax_path(place)
        self._place = place
        self._message = message
        self._read_only = read_only
        self._best_step: int | None = None
        options = ocp.CheckpointManagerOptions(
            # Not by Orbax's BestN: it reads the metrics of every checkpoint at start, and a damaged one stops it.
            preservation_policy=_Kept(keep, lambda: self._best_step),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        self._manager = self._open(options)

    def _open(self, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
        """Orbax's manager; one that reads only may meet a checkpoint that the run is just deleting, and looks again."""
        for _ in range(_OPEN_RETRIES if self._read_only else 0):
            try:
                return _Manager(self._folder, item_names=("state", "record"), options=options)
            except (AttributeError, OSError):  # Orbax takes metadata that are gone for None
                time.sleep(0.2)
        return _Manager(self._folder, item_names=("state", "record"), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        with storage.writing(self._place):
            self._manager.close()

    def save(self, state: TrainState, sums: dict[str, int], progress: dict[str, Any], best_step: int | None) -> None:
        """Saves in the background; the state may be donated at once.

        Args:
          state: its step names the checkpoint; saved again for a step that is saved already, nothing happens.
          sums: its `checksums_of`.
          progress: what JSON can have.
          best_step: the step that is kept beside the newest, if there is one.

        Raises:
          RecordError: it, or the one before, could not be written.
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
            self._manager.save(step, args=args)  # raises, too, what went wrong with the one before

    def wait(self) -> None:
        """Returns when everything saved is on disk.

        Raises:
          RecordError: it could not be written.
        """
        with storage.writing(f"the newest checkpoint in {self._place}"):
            self._manager.wait_until_finished()

    @property
    def exist(self) -> bool:
        """Whether there is a checkpoint, whole or not."""
        return self._folder.exists() and bool(self._manager.all_steps())

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest whole checkpoint's state, sharded as `like` is, and its progress; None: there is no checkpoint.

        Damaged ones are named and, unless `read_only`, set aside as `checkpoints/damaged-<step>`.

        Raises:
          UserError: there are checkpoints, and none is whole, or the newest that is has other arrays than `like`. Or
            one of several processes met a damaged one (exit code 143).
          RecordError, OutOfMemoryError: one could not be read; it stays as it is.
        """
        steps = sorted(self._manager.all_steps(), reverse=True) if self.exist else []
        reason = ""
        for step in steps:
            try:
                return self._restore(step, like)
            except (UserError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:  # Orbax raises whatever its readers do, where files are cut or gone
                if "Gloo" in str(error):  # another process has ended: XLA's error, but a ValueError
                    raise
                reason = " ".join(str(error).split())[:200]
                if not _is_damage(error):
                    raise as_out_of_memory_error(error) or RecordError(
                        f"checkpoint {step} in {self._place} could not be read ({reason}): it is as it was, and once "
                        "that is mended the same command resumes from it"
                    ) from error
                # What its checksums say all processes see, what its files are each for itself: the others wait for it.
                alone = jax.process_count() > 1 and not isinstance(error, _DamagedError)
                if alone and self._read_only:
                    raise UserError(
                        f"checkpoint {step} in {self._place} is damaged ({reason}): resume the run, which sets it "
                        "aside, or look at it with one process, which takes the one before"
                    ) from None
                self._message(f"checkpoint {step} is damaged ({reason}): using the one before")
                self._set_aside(step, alone=alone)
                if alone:
                    raise _SetAsideError(
                        f"checkpoint {step} in {self._place} is damaged ({reason}) and was set aside: the same command "
                        "goes on from the one before"
                    ) from None
        if steps or (self._folder.exists() and any(self._folder.glob("damaged-*"))):
            raise UserError(
                f"no checkpoint in {self._place} can be restored ({reason or 'all were found damaged before'}): to "
                "train anew, give another --workdir"
            )
        return None

    def _restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        if record.pop("crc32") != _crc(record):
            raise _DamagedError("its record's checksum differs")
        if record.get("random_streams") != randomness.VERSION:
            raise UserError(
                f"checkpoint {step} in {self._place} is of a version that held out other examples and drew other "
                "random numbers: use that version, or train anew with another --workdir"
            )
        arrays = _flat(like)
        kinds = _kinds(arrays)
        for name in sorted(kinds.keys() | record["kinds"].keys()):
            has, wants = record["kinds"].get(name, "nothing"), kinds.get(name, "nothing")
            if has != wants:
                raise UserError(
                    f"checkpoint {step} in {self._place} is another network's or version's ({name}: it holds {has} "
                    f"where this program has {wants}): leave out the flags by which this command differs from the "
                    "run's, or use the version that wrote it"
                )
        shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for n, x in arrays.items()}
        args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
        restored = self._manager.restore(step, args=args)["state"]
        sums = checksums(restored)
        for name, value in record["checksums"].items():
            if value != sums[name]:
                raise _DamagedError(f"the checksum of {name} differs")
        # A copy that XLA made: what Orbax returns may share memory with its caller, and the state is donated.
        copies = [jnp.copy(restored.pop(name)) for name in arrays]
        return jax.tree.unflatten(jax.tree.structure(like), copies), record["progress"]

    def _set_aside(self, step: int, *, alone: bool) -> None:
        if self._read_only:
            return
        if alone:
            with contextlib.suppress(FileNotFoundError):  # another process has done it
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
