"""`launch.job`: what all launchers say of themselves."""

import pytest

from launch import export, gke, plan, tpu


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
