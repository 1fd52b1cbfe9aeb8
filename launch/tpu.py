"""A run on Cloud TPU VMs, by gcloud: v4, v5e, v5p and v6e, of one host or many.

python -m launch.tpu up experiments.cifar_cnn --name=NAME --zone=ZONE --accelerator=v6e-8 --spot --workdir=gs://B/DIR
python -m launch.tpu create|setup|run|status|logs|stop|delete --name=NAME --zone=ZONE ...

`up` is create, setup and run, again from the newest checkpoint where the TPU is preempted at any time of these, and
delete at the end, which a signal may be. `setup` copies this repository, as git sees it, to every host and installs it;
`run` shows what the hosts print, and keeps it in `runs/tpu/<what>/<date-time>/log.txt`; `stop` asks what `run` started
for a checkpoint and an end. The workdir must be one that all hosts see: gs://.
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

_SECONDS_BETWEEN_LOOKS = 10.0
_NO_RESTART = (0, *job_lib.NON_RETRYABLE_EXIT_CODES)  # done, or an end that another TPU would not change


class _LostError(UserError):
    """The TPU was taken away: another one may do. The exit code is that of a run that was terminated."""

    exit_code = 143


def _lost(state: str) -> _LostError:
    return _LostError(f"the TPU was {state.lower() if state in gcloud.LOST else 'lost'}")


def _check_there(tpu: Tpu) -> None:
    if (state := gcloud.state(tpu)) not in gcloud.THERE:
        raise _lost(state)


def _wait(tpu: Tpu) -> None:
    """Returns when the TPU is there.

    Raises:
      _LostError: it was taken away before it was ready.
      UserError: there will be none.
    """
    state = None
    while (now := gcloud.state(tpu)) not in gcloud.THERE:
        if now in (*gcloud.LOST, gcloud.NOT_FOUND):
            raise _lost(now)
        if now == gcloud.FAILED:
            gcloud.call(tpu.describe())
            raise UserError("the queued resource failed, for the reason that stands above: mend that and start again")
        if now != state:
            print(f"TPU: {now.lower() or 'gcloud cannot say, and `launch.tpu status` shows why'}", file=sys.stderr)
        state = now
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def archive(folder: Path, to: Path) -> None:
    """Packs the files of a git checkout, the changed and new ones too, without what git ignores.

    Raises:
      UserError: the folder is no checkout.
    """
    command = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{folder} is no git checkout, by which `setup` knows what to copy: {done.stderr.strip()}")
    with tarfile.open(to, "w:gz") as tar:
        for name in filter(None, done.stdout.split("\0")):
            if (folder / name).exists():
                tar.add(folder / name, f"meshwork/{name}", recursive=False)


@contextmanager
def _archived() -> Iterator[Path]:
    """Within it there is an archive of this folder."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "meshwork.tar.gz"
        archive(Path.cwd(), path)
        yield path


def _setup(tpu: Tpu, path: Path) -> None:
    for command in tpu.setup(path):
        gcloud.call(command)


def _run(tpu: Tpu, job: Job) -> int:
    """Shows and keeps what all hosts print; returns the exit code."""
    log = Path(f"runs/tpu/{job.experiment.name}/{time.strftime('%Y-%m-%d-%H%M%S')}/log.txt")
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
            process.kill()  # where a signal came: it would go on
    print(f"log: {log}", file=sys.stderr)
    return code


def _train(tpu: Tpu, job: Job, path: Path) -> int:
    """Everything from the TPU's creation to the run's end; returns the run's exit code.

    Raises:
      _LostError: the TPU was taken away meanwhile.
      UserError: gcloud failed.
    """
    try:
        gcloud.create(tpu)
    except GcloudError:
        if gcloud.state(tpu) not in gcloud.LOST:  # as it may be before it was ready, or not be deleted yet
            raise
    _wait(tpu)
    try:
        _setup(tpu, path)
    except GcloudError:
        _check_there(tpu)
        raise
    code = _run(tpu, job)
    if code not in _NO_RESTART:
        _check_there(tpu)
    return code


def _delete(tpu: Tpu) -> None:
    command = tpu.delete()
    if subprocess.run(command).returncode and gcloud.state(tpu) != gcloud.NOT_FOUND:
        print(f"the TPU may still be there, and cost: `{shlex.join(command)}` deletes it", file=sys.stderr)


def _make_room(tpu: Tpu, name: str) -> None:
    """Deletes what is left of a TPU of this name; one that somebody may be using is refused."""
    state = gcloud.state(tpu)
    if not state:
        raise UserError(f"gcloud cannot say whether there is a TPU of this name: see `{shlex.join(tpu.describe())}`")
    if state in (*gcloud.GONE, gcloud.FAILED):
        _delete(tpu)
    elif state != gcloud.NOT_FOUND:
        raise UserError(
            f"--name={name}: there is such a TPU already ({state.lower()}); `run` uses it, `delete` ends it, or give "
            "another name"
        )


def _up(tpu: Tpu, job: Job) -> int:
    restarts, lost, ends = job.options.max_restarts, None, not job.options.keep
    with _archived() as path:  # which may be impossible, before anything is created
        _make_room(tpu, job.options.name)
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
                f"{lost}, and --max_restarts={restarts} allows no other: the same command goes on from the newest "
                "checkpoint"
            )
        except gcloud.TakenError:
            ends = False
            raise
        finally:
            if ends:
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
    run = tpu.run(job)
    end = [] if job.options.keep else [tpu.delete()]
    return [run] if verb == "run" else [tpu.create(), *tpu.setup(path), run, *end]


def _do(verb: str, tpu: Tpu, job: Job | None) -> int:
    if job:
        return _up(tpu, job) if verb == "up" else _run(tpu, job)
    if verb == "setup":
        with _archived() as path:
            _setup(tpu, path)
        return 0
    return subprocess.run(_commands(verb, tpu, job)[0]).returncode


def run(argv: Sequence[str]) -> int:
    """Does what the command line says; returns the exit code.

    Raises:
      UserError: bad input, found before anything is created; gcloud failed; or `up` lost more TPUs than it may.
      StoppedError: a signal came.
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
    gcloud.check(options)
    tpu = Tpu(options)
    if options.dry_run:
        for command in _commands(verb, tpu, job):
            print(shlex.join(command))
        return 0
    if not shutil.which("gcloud"):
        raise UserError("there is no gcloud on this machine: install the Google Cloud CLI, or look at --dry_run")
    with Signals().handled():  # or a TPU would outlive the `up` that made it
        return _do(verb, tpu, job)


if __name__ == "__main__":
    job_lib.main(run)
