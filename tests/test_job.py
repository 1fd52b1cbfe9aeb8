"""`launch.job`: what all launchers say of themselves."""

import pytest

from launch import export, gke, local, plan, scaling, slurm, sweep, tpu
from research.errors import UserError

pytest.importorskip("optuna", reason="the extra `sweep` is not installed")

RATE = "--search=optimizer.learning_rate=log(1e-3,1)"


@pytest.mark.parametrize(
    ("launcher", "args", "said"),
    [
        (plan, ["--help"], "--workdir=DIR  folder of the record (default: runs/plan/<what>/<date-time>)"),
        (export, ["--help"], "folder of the run to export; it must be given"),
        (gke, ["--help"], "folder of the record that all machines see, gs://BUCKET/FOLDER; it must be given"),
        (tpu, ["up", "--help"], "folder of the record that all hosts see, gs://BUCKET/FOLDER; `up` and `run` need it"),
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
    with pytest.raises(UserError, match=f"there is no {module} "):
        plan.run([module, "--topology=v5e-4"])


LOCAL, TPU = ["--workdir=x", "--dry_run"], ["--workdir=gs://b/x", "--storage=postgresql://h/d", "--dry_run"]


@pytest.mark.parametrize(
    ("launcher", "args", "words"),
    [
        (slurm, [*LOCAL, "--search=nofield=[1]"], "there is no field nofield"),
        (local, [*LOCAL], "say what to vary"),
        (slurm, [*LOCAL, "--search=model.width=[8,9]", "--config.max_rewinds=1"], "--config.max_rewinds"),
        (slurm, [*LOCAL, RATE, "--storage=postgresql://u:secret@h/d"], "a URL with a password would stand in logs"),
        (tpu, [*TPU, "--search=/home/me/space.py"], "give a path within it"),
        (local, [*LOCAL, "--seeds=3", "--config.seed=4294967295"], "seed"),
    ],
)
def test_a_worker_that_could_not_begin_is_not_sent(launcher, args, words):
    verb = ["run"] if launcher is tpu else []
    with pytest.raises(UserError, match=words) as error:
        launcher.run([*verb, "launch.sweep", "experiments.cifar_cnn", *args])
    assert "secret" not in str(error.value)


def test_what_makes_runs_of_its_own_is_not_swept():
    with pytest.raises(UserError, match="cifar_speedrun makes runs of its own"):
        sweep.run(["experiments.cifar_speedrun", RATE, "--workdir=x"])


@pytest.mark.parametrize(
    ("launcher", "flag", "meant"),
    [(slurm, "--node=2", "--nodes"), (local, "--process=2", "--processes"), (scaling, "--device=1", "--devices")],
)
def test_a_launchers_own_flag_may_have_been_meant(launcher, flag, meant):
    with pytest.raises(UserError, match=f"did you mean {meant}\\?"):
        launcher.run(["experiments.cifar_cnn", flag])
