"""Checkpoints: bit-exact on any mesh, with damage detected."""

import dataclasses
import errno
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import same
from jax.experimental import multihost_utils

from research import randomness, sharding
from research.config import Config, MeshConfig
from research.errors import OutOfMemoryError, RecordError, UserError
from research.training import checkpoint
from research.training.checkpoint import Checkpoints, checksums_of
from research.training.state import TrainState

# TensorStore leaves futures unawaited when a read fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PROGRESS = {"epoch": 1, "sums": {"loss": 0.1 + 0.2}, "row": {}}


def _mesh(devices, **axes):
    return sharding.make_mesh(Config(batch_size=8, mesh=MeshConfig(**axes)), jax.devices()[:devices])


def _state(step=0, seed=0, mesh=None):
    rng = np.random.default_rng(seed)
    arrays = {
        "kernel": rng.normal(size=(8, 6)).astype(np.float32),
        "half": jnp.asarray(rng.normal(size=(4,)), jnp.bfloat16),
        "flag": np.array([True, False, True]),
        "count": np.int32(seed),
    }
    state = TrainState(
        np.int32(step), arrays, {"mean": arrays["kernel"][0]}, {}, {"byte": np.int8([-1, 5])}, None, None
    )
    return jax.device_put(state, sharding.tree_shardings(jax.eval_shape(lambda: state), mesh or _mesh(1)))


def _save(folder, *states, best=()):
    with Checkpoints(folder, keep=2, message=print) as saved:
        for number, state in enumerate(states):
            saved.save(state, checksums_of(state), PROGRESS, best[number] if best else None)


def _restore(folder, like, **options):
    warnings = []
    with Checkpoints(folder, keep=2, message=warnings.append, **options) as saved:
        return saved.restore(like), warnings


def test_a_checkpoint_restores_what_was_saved(tmp_path):
    state = _state(7)
    _save(tmp_path, state)
    (restored, progress), warnings = _restore(tmp_path, _state(0, seed=1))
    same(restored, state)
    assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, state)
    assert progress == PROGRESS
    assert not warnings


def test_without_its_carry_a_checkpoint_restores_for_another_batch_size(tmp_path):
    saved_carry, carry = jax.device_put((np.ones((1, 4, 2)), np.zeros((1, 2, 2))), sharding.replicated(_mesh(1)))
    state = dataclasses.replace(_state(7), carry={"cell": saved_carry})
    _save(tmp_path, state)
    like = dataclasses.replace(_state(0, seed=1), carry={"cell": carry})
    with pytest.raises(UserError, match=r"carry.cell: the checkpoint has float32\[1, 4, 2\], this program .*2, 2\]"):
        _restore(tmp_path, like, read_only=True)
    (restored, progress), warnings = _restore(tmp_path, dataclasses.replace(like, carry=None), read_only=True)
    same(restored, dataclasses.replace(state, carry=None))
    assert jax.tree.map(lambda x: x.sharding, restored.params) == jax.tree.map(lambda x: x.sharding, like.params)
    assert (progress, warnings) == (PROGRESS, [])


def test_orbax_does_not_use_the_preemption_sync_point(tmp_path, monkeypatch):
    """jax agrees on one number after the last it was asked about: Orbax's steps would disturb the loop's count."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    _save(tmp_path, _state(3), _state(6))
    assert asked == []


def test_restore_returns_none_without_checkpoints(tmp_path):
    assert _restore(tmp_path, _state()) == (None, [])
    assert _restore(tmp_path / "nowhere", _state(), read_only=True) == (None, [])


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({"devices": 1}, {"devices": 8, "fsdp": 4}),
        ({"devices": 8, "fsdp": 4, "model": 2}, {"devices": 1}),
        ({"devices": 2}, {"devices": 4}),
    ],
)
def test_a_checkpoint_restores_on_another_mesh(there, here, tmp_path):
    _save(tmp_path, _state(3, mesh=_mesh(**there)))
    like = _state(0, seed=1, mesh=_mesh(**here))
    (restored, _), warnings = _restore(tmp_path, like)
    same(restored, _state(3))
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)
    assert not warnings


def test_a_state_may_be_donated_right_after_save(tmp_path):
    step = jax.jit(
        lambda state: jax.tree.map(lambda x: x ^ True if x.dtype == bool else x + 1, state), donate_argnums=0
    )
    state = _state(1)
    copy = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path, keep=2, message=print) as saved:
        saved.save(state, checksums_of(state), PROGRESS, None)
        for _ in range(20):
            state = step(state)
    same(_restore(tmp_path, _state())[0][0], copy)


def _flip(path):
    data = bytearray(path.read_bytes())
    for i in range(len(data) // 2, len(data), 40):
        data[i] ^= 16
    path.write_bytes(data)


DAMAGE = {
    "flipped": _flip,
    "cut": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "gone": lambda p: p.unlink(),
}


@pytest.mark.parametrize("carry", [{}, None])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_detected_or_harmless(damage, carry, tmp_path):
    older, newer = _state(1, seed=1), _state(2, seed=2)
    _save(tmp_path / "whole", older, newer)
    files = [path for path in (tmp_path / "whole/checkpoints/2").rglob("*") if path.is_file() and path.stat().st_size]
    fell_back = 0
    for number, file in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", copy)
        DAMAGE[damage](copy / file.relative_to(tmp_path / "whole"))
        (restored, progress), warnings = _restore(copy, dataclasses.replace(_state(), carry=carry))
        same(restored.params, (older if warnings else newer).params)
        assert progress == PROGRESS
        if warnings:
            fell_back += 1
            assert warnings[0].startswith("checkpoint 2 is damaged (")
            assert (copy / "checkpoints/damaged-2").exists()
    assert fell_back >= 2  # the data, and the record


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), OutOfMemoryError),
        (ValueError("RESOURCE_EXHAUSTED: no memory"), OutOfMemoryError),
        (RuntimeError("can't start new thread"), RecordError),
        (OSError(errno.EMFILE, "too many open files"), RecordError),
        (PermissionError(errno.EACCES, "no permission"), RecordError),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), ValueError),
        (jax.errors.JaxRuntimeError("UNKNOWN: Connection closed by peer"), jax.errors.JaxRuntimeError),
        (ValueError("PERMISSION_DENIED: Error opening local file"), RecordError),
    ],
)
def test_an_unreadable_checkpoint_is_not_taken_for_damaged(error, kind, tmp_path, monkeypatch):
    _save(tmp_path, _state(1), _state(2))
    with monkeypatch.context() as failing:
        failing.setattr(Checkpoints, "_restore", lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(kind):
            _restore(tmp_path, _state())
    (restored, _), warnings = _restore(tmp_path, _state())
    assert (int(restored.step), warnings) == (2, [])


def test_damage_seen_by_one_of_several_processes_ends_all(tmp_path, monkeypatch):
    """The others are waiting inside Orbax; the next start restores the previous checkpoint."""
    _save(tmp_path, _state(1), _state(2))

    def damaged(*_):
        several.setattr(jax, "process_count", lambda: 2)
        raise ValueError("a file of this process is gone")

    with monkeypatch.context() as several, Checkpoints(tmp_path, keep=2, message=lambda _: several.undo()) as saved:
        several.setattr(Checkpoints, "_restore", damaged)
        with pytest.raises(UserError, match=r"checkpoint 2 in .* was set aside: the same command resumes") as raised:
            saved.restore(_state())
    assert raised.value.exit_code == 143
    (restored, _), warnings = _restore(tmp_path, _state())
    assert (int(restored.step), warnings) == (1, [])


def test_damage_seen_by_one_of_several_read_only_processes_changes_nothing(tmp_path, monkeypatch):
    _save(tmp_path, _state(1), _state(2))

    def damaged(*_):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        raise ValueError("a file of this process is gone")

    with Checkpoints(tmp_path, keep=2, message=print, read_only=True) as saved:
        monkeypatch.setattr(Checkpoints, "_restore", damaged)
        with pytest.raises(UserError, match="use a single process, which falls back to the previous") as raised:
            saved.restore(_state())
        monkeypatch.undo()
    assert raised.value.exit_code == 2
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} >= {"1", "2"}


def test_an_empty_checkpoint_folder_counts_as_damaged(tmp_path):
    _save(tmp_path, _state(1, seed=1))
    (tmp_path / "checkpoints/2").mkdir()
    (restored, _), warnings = _restore(tmp_path, _state(), read_only=True)
    same(restored, _state(1, seed=1))
    assert "checkpoint 2 is damaged" in warnings[0]
    assert (tmp_path / "checkpoints/2").exists()  # read-only: left in place


def test_no_intact_checkpoint_is_an_error(tmp_path):
    _save(tmp_path, _state(1), _state(2))
    for step in (1, 2):
        _flip(tmp_path / f"checkpoints/{step}/record/metadata")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be restored"):
        _restore(tmp_path, _state())


def test_a_flipped_bit_that_orbax_restores_is_detected(tmp_path, monkeypatch):
    _save(tmp_path, _state(1, seed=1), _state(2, seed=2))
    restore = checkpoint.ocp.CheckpointManager.restore

    def flipped(self, step, args):
        result = restore(self, step, args=args)
        if step == 2 and "state" in dict(result):
            whole = result["state"]["params.kernel"]
            kernel = np.array(whole)
            kernel.view(np.uint32)[3, 2] ^= 1
            result["state"]["params.kernel"] = jax.device_put(kernel, whole.sharding)
        return result

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "restore", flipped)
    (restored, _), warnings = _restore(tmp_path, _state())
    same(restored, _state(1, seed=1))
    assert "the checksum of params.kernel differs" in warnings[0]


def test_another_dtype_or_shape_is_an_error(tmp_path):
    _save(tmp_path, _state(1))
    like = _state()
    like.params["kernel"] = like.params["kernel"].astype(jnp.bfloat16)
    with pytest.raises(
        UserError, match=r"params.kernel: the checkpoint has float32\[8, 6\], this program bfloat16\[8, 6\]"
    ):
        _restore(tmp_path, like, read_only=True)
    del like.params["kernel"]
    with pytest.raises(UserError, match=r"params.kernel: the checkpoint has float32\[8, 6\], this program nothing"):
        _restore(tmp_path, like, read_only=True)
    with pytest.raises(UserError, match="another network or version"):
        _restore(tmp_path, like)
    (restored, _), warnings = _restore(tmp_path, _state())  # intact, and still there
    same(restored, _state(1))
    assert not warnings


@pytest.mark.parametrize(
    ("best", "kept"), [([1, 2, 2, 2, 2], {2, 4, 5}), ([None] * 5, {4, 5}), ([1, 2, 2, 4, 4], {4, 5})]
)
def test_the_newest_and_the_best_are_kept(best, kept, tmp_path):
    _save(tmp_path, *(_state(step) for step in range(1, 6)), best=best)
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == kept


def test_writes_that_fail_after_the_event_loop_closed_print_nothing():
    """In a subprocess, because pytest sets sys.unraisablehook itself."""
    program = """
import sys, types
sys.unraisablehook = lambda found: print(found.exc_value)
import research.training.checkpoint
for error in (RuntimeError("Event loop is closed"), RuntimeError("another")):
    sys.unraisablehook(types.SimpleNamespace(exc_value=error))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "another\n"


def test_a_checkpoint_of_another_randomness_version_is_refused(tmp_path, monkeypatch):
    """Its validation split, example order and random draws would change within the run."""
    _save(tmp_path, _state(3))
    monkeypatch.setattr(randomness, "VERSION", randomness.VERSION + 1)
    with pytest.raises(UserError, match=r"checkpoint 3 .* other held-out examples and random numbers"):
        _restore(tmp_path, _state())
