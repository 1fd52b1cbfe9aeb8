"""Runs an experiment on a Cloud TPU VM (v4, v5e, v5p or v6e; one host or many), with gcloud.

python -m launch.tpu up experiments.cifar_cnn --name=NAME --zone=ZONE --accelerator=v6e-8 --spot --workdir=gs://B/DIR
python -m launch.tpu create|setup|run|status|logs|stop|delete --name=NAME --zone=ZONE ...

`up` creates the TPU, sets it up and runs the experiment. If the TPU is preempted, `up` replaces it and resumes from the
newest checkpoint. At the end, or after a signal, it deletes the TPU. `setup` copies the files that git tracks, and
untracked ones, to every host and installs them. `run` shows the hosts' output and saves it as
`runs/tpu/<experiment>/<date-time>-<random>/log.txt`. `stop` makes the run save a checkpoint and exit. The workdir must
be one that all hosts can access: gs://.
"""

import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launch import gcloud
from launch import job as job_lib
from launch.gcloud import GcloudError, Tpu, TpuOptions
from launch.job import Job
from research.errors import UserError
from research.process.signals import Signals
from research.record.workdir import default_workdir

_POLL_SECONDS = 10.0
_FINAL_EXIT_CODES = (0, *job_lib.NON_RETRYABLE_EXIT_CODES)  # another TPU would not change the outcome


class _LostError(UserError):
    """The TPU was preempted or deleted, and may be replaced. The exit code is that of a terminated run (SIGTERM)."""

    exit_code = 143


def _lost(state: str) -> _LostError:
    return _LostError(f"the TPU was {state.lower() if state in gcloud.LOST_STATES else 'lost'}")


def _check_ready(tpu: Tpu) -> None:
    """Raises `_LostError` if the TPU was preempted or deleted."""
    if (state := gcloud.state(tpu)) not in gcloud.READY_STATES:
        raise _lost(state)


def _wait(tpu: Tpu) -> None:
    """Waits until the TPU is ready.

    Raises:
      _LostError: it was preempted or deleted before it was ready.
      UserError: its creation failed.
    """
    state = None
    while (now := gcloud.state(tpu)) not in gcloud.READY_STATES:
        if now in (*gcloud.LOST_STATES, gcloud.NOT_FOUND):
            raise _lost(now)
        if now == gcloud.FAILED:
            gcloud.call(tpu.describe())
            raise UserError(
                "the queued resource failed for the reason shown above: fix that, then run the command again"
            )
        if now != state:
            print(f"TPU: {now.lower() or 'unknown (`launch.tpu status` shows why)'}", file=sys.stderr)
        state = now
        time.sleep(_POLL_SECONDS)


def archive(folder: Path, to: Path) -> None:
    """Packs the tracked and untracked files of a git checkout, without the ignored ones.

    Raises:
      UserError: the folder is not a git checkout.
    """
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"{folder} is not a git checkout, from which `setup` takes the files to copy: {done.stderr.strip()}"
        )
    with tarfile.open(to, "w:gz") as tar:
        for name in filter(None, done.stdout.split("\0")):
            if (folder / name).exists():
                tar.add(folder / name, f"meshwork/{name}", recursive=False)


@contextmanager
def _archived() -> Iterator[Path]:
    """A context with the path of an archive of the working directory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "meshwork.tar.gz"
        archive(Path.cwd(), path)
        yield path


def _run(tpu: Tpu, job: Job) -> int:
    """Runs the job, with the hosts' output shown and logged; returns the exit code."""
    log = Path(default_workdir("tpu", job.experiment.name), "log.txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(tpu.run(job), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                sys.stdout.write(line.decode(errors="replace"))
                sys.stdout.flush()
            code = process.wait()
        finally:
            process.kill()  # if a signal interrupted the loop, ssh would keep running
    print(f"log: {log}", file=sys.stderr)
    return code


def _train(tpu: Tpu, job: Job, path: Path) -> int:
    """Creates the TPU, sets it up and runs the job; returns the run's exit code.

    Raises:
      _LostError: the TPU was preempted or deleted meanwhile.
      UserError: gcloud failed.
    """
    try:
        gcloud.create(tpu)
    except GcloudError:
        if gcloud.state(tpu) not in gcloud.LOST_STATES:  # it may be preempted before it is ready
            raise
    _wait(tpu)
    try:
        gcloud.call(*tpu.setup(path), *tpu.mount())
    except GcloudError:
        _check_ready(tpu)
        raise
    code = _run(tpu, job)
    if code not in _FINAL_EXIT_CODES:
        _check_ready(tpu)
    return code


def _delete(tpu: Tpu) -> None:
    command = tpu.delete()
    if subprocess.run(command).returncode and gcloud.state(tpu) != gcloud.NOT_FOUND:
        print(f"the TPU may still exist and incur costs: `{shlex.join(command)}` deletes it", file=sys.stderr)


def _delete_leftover(tpu: Tpu, name: str) -> None:
    """Deletes a preempted or failed TPU of this name; raises `UserError` if one exists that may be in use."""
    state = gcloud.state(tpu)
    if not state:
        raise UserError(f"gcloud cannot tell whether a TPU with this name exists: see `{shlex.join(tpu.describe())}`")
    if state in gcloud.DELETABLE_STATES:
        _delete(tpu)
    elif state != gcloud.NOT_FOUND:
        raise UserError(
            f"--name={name}: this TPU exists already ({state.lower()}): use it with `run`, delete it with `delete`, or "
            "give another name"
        )


def _up(tpu: Tpu, job: Job) -> int:
    restarts, lost, delete = job.options.max_restarts, None, not job.options.keep
    with _archived() as path:  # first, since it may fail
        _delete_leftover(tpu, job.options.name)
        try:
            for restart in range(restarts + 1):
                if lost:
                    print(f"{lost}: restart {restart} of {restarts}", file=sys.stderr)
                    _delete(tpu)
                try:
                    return _train(tpu, job, path)
                except _LostError as error:
                    lost = error
            raise _LostError(
                f"{lost}, and --max_restarts={restarts} allows no more: the same command resumes from the newest "
                "checkpoint"
            )
        except gcloud.NameTakenError:
            delete = False  # it is not ours
            raise
        finally:
            if delete:
                _delete(tpu)


_EXPERIMENT_VERBS = ("up", "run")
_VERBS = (*_EXPERIMENT_VERBS, "create", "setup", "status", "logs", "stop", "delete")


def _commands(verb: str, tpu: Tpu, job: Job | None) -> list[list[str]]:
    """The gcloud commands of a verb, in order."""
    path = Path("meshwork.tar.gz")
    match verb:
        case "create":
            return [tpu.create()]
        case "setup":
            return tpu.setup(path)
        case "status":
            return [tpu.state()]
        case "logs":
            return [tpu.ssh("tail -n 1000 -f meshwork.log", "0")]
        case "stop":
            return [tpu.stop()]
        case "delete":
            return [tpu.delete()]
    assert job
    run = [*tpu.mount(), tpu.run(job)]
    end = [] if job.options.keep else [tpu.delete()]
    return run if verb == "run" else [tpu.create(), *tpu.setup(path), *run, *end]


def _do(verb: str, tpu: Tpu, job: Job | None) -> int:
    if job and verb == "up":
        return _up(tpu, job)
    if job:
        gcloud.call(*tpu.mount())
        return _run(tpu, job)
    if verb == "setup":
        with _archived() as path:
            gcloud.call(*tpu.setup(path))
        return 0
    return subprocess.run(_commands(verb, tpu, job)[0]).returncode


def run(argv: Sequence[str]) -> int:
    """Runs the verb of the command line; returns the exit code.

    Raises:
      UserError: bad input, found before anything is created; gcloud failed; or `up` ran out of restarts.
      StoppedError: a stop signal was received.
    """
    options, job = TpuOptions(), None
    argv = argv or ["--help"]
    verb = argv[0]
    if verb in _EXPERIMENT_VERBS:
        job = job_lib.parse("tpu", str(__doc__), options, argv[1:])
        job_lib.check_remote(job)
    else:
        _, rest = job_lib.parse_options("tpu", str(__doc__), options, argv[verb in _VERBS :])
        if verb not in _VERBS or rest:
            raise UserError(f"unexpected {(rest or argv)[0]!r}: the first argument is one of {', '.join(_VERBS)}")
        if options.mount:
            raise UserError(f"--mount is for `up` and `run`, which mount the buckets: leave it out of `{verb}`")
    gcloud.check(options)
    tpu = Tpu(options)
    if options.dry_run:
        for command in _commands(verb, tpu, job):
            print(shlex.join(command))
        return 0
    if not shutil.which("gcloud"):
        raise UserError("gcloud is not installed on this machine: install the Google Cloud CLI, or use --dry_run")
    with Signals().handled():  # so that `up` still deletes its TPU after a signal
        return _do(verb, tpu, job)


if __name__ == "__main__":
    job_lib.main(run)
