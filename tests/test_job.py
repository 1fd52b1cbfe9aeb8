"""`launch.job`: what all launchers say of themselves."""

import shlex
import time
from pathlib import Path

import pytest

from experiments.cifar_cnn import EXPERIMENT
from launch import export, gke, local, plan, predict, scaling, slurm, sweep, tpu
from launch import job as job_lib
from launch.sweeps import search_space, trials
from launch.sweeps.options import SweepOptions
from research import flags, paths
from research.data import tfds_sets
from research.errors import UserError

pytest.importorskip("optuna", reason="the extra `sweep` is not installed")

RATE = "--search=optimizer.learning_rate=log(1e-3,1)"


@pytest.mark.parametrize(
    ("launcher", "args", "said"),
    [
        (plan, ["--help"], "folder for the record (default: runs/plan/<experiment>/<date-time>-<random>)"),
        (export, ["--help"], "required: folder of the run to export"),
        (gke, ["--help"], "required: folder for the record that all machines can access, gs://BUCKET/FOLDER"),
        (tpu, ["up", "--help"], "required for `up` and `run`: folder for the record that all hosts can access"),
    ],
)
def test_help_names_a_workdir_of_its_own_only_where_there_is_one(launcher, args, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        launcher.run(args)
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert said in out
    assert out.count("\n  --workdir") == 1
    assert ("(default: runs/" in out) == (launcher is plan)


@pytest.mark.parametrize("launcher", [plan, scaling, export])
def test_only_those_that_run_workers_take_a_sweep(launcher):
    with pytest.raises(UserError, match="name one experiment"):
        launcher.run(["launch.sweep", "experiments.cifar_cnn"])


@pytest.mark.parametrize("launcher", [sweep, scaling])
def test_a_folder_of_a_run_is_not_taken_for_one_of_its_own(launcher, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run"):
        launcher.run(["experiments.cifar_cnn", f"--workdir={tmp_path}", *([RATE] if launcher is sweep else [])])


@pytest.mark.parametrize("module", ["", ".experiments", "experiments.nothing"])
def test_what_is_no_module_is_named(module):
    with pytest.raises(UserError, match=f"cannot import {module} "):
        plan.run([module, "--topology=v5e-4"])


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, and a different working directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "home"


def test_every_path_may_begin_with_the_home_folder(home):
    """The shell does not expand `--flag=~/x`."""
    home.mkdir()
    (home / "space.py").write_text("def search(trial):\n    trial.suggest_int('model.width', 8, 9)\n")
    assert flags.parse(EXPERIMENT, ["--workdir=~/x"]).workdir == home / "x"
    assert job_lib.parse("local", "", local.LocalOptions(), ["linear", "--workdir=~/x"]).workdir == f"{home}/x"
    predicted = predict.parse(["--artifact=~/a", "--out=~/o"])
    assert (predicted.artifact, predicted.out) == (home / "a", home / "o")
    (home / "o").mkdir()
    (home / "o/file").touch()
    with pytest.raises(UserError, match=f"{home}/o"):
        export.run(["linear", "--workdir=~/x", "--out=~/o"])
    assert search_space.parse(["~/space.py"], EXPERIMENT.default_config).function
    trials.open_storage("~/journal.log", home)
    assert (home / "journal.log").exists()
    assert tfds_sets.data_folder("~/o") == home / "o"
    compare_with = paths.open_path("~/plot.png")
    assert compare_with == home / "plot.png"
    assert not list(Path().iterdir())


def test_runs_started_in_the_same_second_have_different_workdirs(monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "2026-01-01-000000")
    workdirs = [flags.parse(EXPERIMENT, []).workdir for _ in range(3)]
    workdirs += [job_lib.parse("local", "", local.LocalOptions(), ["linear"]).workdir for _ in range(3)]
    assert len(set(workdirs)) == 6
    assert all(str(workdir).startswith("runs/") for workdir in workdirs)


LOCAL, TPU = ["--workdir=x", "--dry_run"], ["--workdir=gs://b/x", "--storage=postgresql://h/d", "--dry_run"]


@pytest.mark.parametrize(
    ("launcher", "args", "words"),
    [
        (slurm, [*LOCAL, "--search=nofield=[1]"], "no field nofield"),
        (local, [*LOCAL], "nothing to vary"),
        (slurm, [*LOCAL, "--search=model.width=[8,9]", "--config.max_rewinds=1"], "--config.max_rewinds"),
        (slurm, [*LOCAL, RATE, "--storage=postgresql://u:secret@h/d"], "a URL with a password would appear in logs"),
        (tpu, [*TPU, "--search=/home/me/space.py"], "give a path within it"),
        (tpu, [*TPU, "--search=~/space.py"], "give a path within it"),
        (local, [*LOCAL, "--seeds=3", "--config.seed=4294967295"], "seed"),
    ],
)
def test_a_worker_that_could_not_begin_is_not_sent(launcher, args, words):
    verb = ["run"] if launcher is tpu else []
    with pytest.raises(UserError, match=words) as error:
        launcher.run([*verb, "launch.sweep", "experiments.cifar_cnn", *args])
    assert "secret" not in str(error.value)


def test_what_makes_runs_of_its_own_is_not_swept():
    with pytest.raises(UserError, match="cifar_speedrun defines its own runs"):
        sweep.run(["experiments.cifar_speedrun", RATE, "--workdir=x"])


@pytest.mark.parametrize(
    ("launcher", "flag", "meant"),
    [(slurm, "--node=2", "--nodes"), (local, "--process=2", "--processes"), (scaling, "--device=1", "--devices")],
)
def test_a_launchers_own_flag_may_have_been_meant(launcher, flag, meant):
    with pytest.raises(UserError, match=f"did you mean {meant}\\?"):
        launcher.run(["experiments.cifar_cnn", flag])


LAUNCHERS = {
    "local": local.LocalOptions,
    "slurm": slurm.SlurmOptions,
    "gke": gke.GkeOptions,
    "tpu": tpu.TpuOptions,
    "plan": plan.PlanOptions,
    "scaling": scaling.ScalingOptions,
    "sweep": SweepOptions,
}
NAME = "experiments.cifar_cnn"


def _parse(where, *argv):
    return job_lib.parse(where, "", LAUNCHERS[where](), argv)


@pytest.mark.parametrize("where", LAUNCHERS)
@pytest.mark.parametrize(
    "argv",
    [
        [NAME, "--config.seed=3", "--config.mirror=true", "--config.translate=false", "--workdir=x y"],
        [NAME, "--config.seed", "3", "--config.mirror", "--noconfig.translate", "--workdir", "x y"],
        ["--workdir", "x y", "--noconfig.translate", "--config.seed", "3", "--config.mirror", NAME],
        ["-workdir", "x y", "-config.mirror", NAME, "-config.seed", "3", "-noconfig.translate"],
    ],
)
def test_flags_have_every_form_that_experiments_accept(where, argv):
    job = _parse(where, *argv)
    assert (job.module, job.workdir) == (NAME, "x y")
    assert (job.config.seed, job.config.mirror, job.config.translate) == (3, True, False)
    assert job.given == {"config.seed", "config.mirror", "config.translate"}
    started = flags.parse(EXPERIMENT, job.command[3:])  # after `python -m NAME`: what the launcher starts
    assert (str(started.workdir), started.config) == ("x y", job.config)


def test_a_launchers_own_flags_have_these_forms_too():
    job = _parse("slurm", "--nodes", "2", NAME, "--nofollow", "--dry_run", "--config.seed", "3")
    assert (job.options.nodes, job.options.follow, job.options.dry_run) == (2, False, True)
    assert job.args == ("--config.seed", "3")
    job = _parse("scaling", "--mode", "strong", NAME, "--devices", "1", "--config.seed", "3")
    assert (job.options.mode, job.options.devices, job.config.seed) == ("strong", "1", 3)


def test_a_sweep_worker_takes_the_flags_of_the_sweep_and_of_the_experiment():
    search = "optimizer.learning_rate=log(1e-3,1)"
    argv = ["launch.sweep", NAME, "--search", search, "--seeds", "2", "--config.seed", "3", "--processes", "4"]
    job = _parse("slurm", "--nodes", "2", *argv)
    assert (job.module, job.options.nodes, job.config.seed) == ("launch.sweep", 2, 3)
    worker = SweepOptions()
    workdir, rest = job_lib.parse_options("sweep", "", worker, job.module_command[1:])
    assert (workdir, *worker.search, worker.seeds, worker.processes) == (job.workdir, search, 2, 0)
    assert rest == [NAME, "--config.seed", "3"]
    assert _parse("slurm", "launch.sweep", "--seeds", "2", "--config.seed", "3", NAME).config == job.config


@pytest.mark.parametrize("workdir", ["x", "gs://b/x"])
def test_a_flag_without_its_value_does_not_take_what_the_launcher_adds(workdir):
    with pytest.raises(UserError, match=r"Missing value for flag --config\.dataset\.data_dir"):
        _parse("gke", NAME, f"--workdir={workdir}", "--config.dataset.data_dir")


def test_two_experiments_are_refused():
    with pytest.raises(UserError, match=r"unexpected argument 'experiments\.mnist_vae'"):
        _parse("local", NAME, "experiments.mnist_vae")


def test_the_mode_of_a_run_elsewhere_is_passed_on():
    job = _parse("tpu", "--workdir", "gs://b/x", NAME, "--mode", "eval")
    assert (job.args, job.given) == (("--mode", "eval"), {"mode"})


def test_scaling_rebuilds_a_command_from_flags_of_every_form(capsys):
    argv = [NAME, "--config.batch_size", "64", "--noconfig.mirror", "--config.seed", "3", "--devices", "2"]
    assert scaling.run([*argv, "--dry_run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    configs = [flags.parse(EXPERIMENT, shlex.split(line.partition(f"{NAME} ")[2])).config for line in lines]
    assert [(config.batch_size, config.seed) for config in configs] == [*[(128, 3)] * 2, *[(64, 3)] * 2]
