"""--profile: which steps are traced, what the table says, and that training does not notice."""

import gzip
import json
import re
import shutil

import jax
import pytest
from drawn import read_lines, run, same

from experiments import cifar_cnn
from research import app
from research.errors import UserError
from research.trace import WAITING_FOR_DATA, Event
from research.training import profile


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without a profile: its workdir and state."""
    workdir = tmp_path_factory.mktemp("plain")
    return workdir, run(workdir)[0]


def _spans(workdir):
    """Returns how many batches were taken during the trace, and the instructions that ran."""
    (path,) = workdir.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    instructions = {e["args"]["hlo_op"] for e in events if "hlo_op" in e.get("args", {})}
    return sum(e.get("name") == WAITING_FOR_DATA for e in events), instructions


def test_a_profile_has_the_chosen_steps_and_changes_nothing(plain, tmp_path, capsys):
    state, _ = run(tmp_path, callbacks=[profile.make("3:7", 22, tmp_path)], steps_per_dispatch=2)
    same(state, plain[1])
    assert read_lines(tmp_path) == read_lines(plain[0])
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("profile of the steps 4 to 7"))
    assert re.search(r"ms per step: on devices [\d.]+%, waiting for data [\d.]+%, other", lines[first + 1])
    count, instructions = _spans(tmp_path / "profile")
    assert count == 2  # dispatches of two steps each
    assert lines[first + 4].split()[2] in instructions


def test_the_table_sorts_operations_and_names_their_source():
    program = '  %dot = f32[2] dot(%a), metadata={op_name="jit(f)/layer/dot_general"}\n  ROOT add = f32[2] add(dot)'
    events = [Event("add", "a", 0, 1), Event("dot", "a", 1, 4), Event(WAITING_FOR_DATA, "host", 4, 5)]
    assert profile.table(events, 8.0, 2, program) == [
        "  4,000.00 ms per step: on devices 50.0%, waiting for data 12.5%, other work of the host 37.5%",
        "  operations by kind: dot 75.0%, add 25.0%",
        "  ms per step   share  operation",
        "     1500.000   75.0%  dot  layer/dot_general",
        "      500.000   25.0%  add",
    ]


@pytest.mark.parametrize("text", ["5", "0:4", "4:4", "4:23", "a:b", "-1:4"])
def test_steps_out_of_range_are_refused(text, tmp_path):
    with pytest.raises(UserError, match=f"--profile={text}: give FIRST:LAST.*<= 22"):
        profile.make(text, 22, tmp_path)


@pytest.mark.parametrize("steps", ["22:24", "3:7"])
def test_a_run_that_resumes_past_these_steps_warns(plain, steps, tmp_path, capsys):
    shutil.copytree(plain[0], tmp_path / "run")
    run(tmp_path / "run", callbacks=[profile.make(steps, 33, tmp_path)], num_epochs=3)
    assert f"WARNING: --profile={steps}: the run resumes at step 22: nothing is profiled" in capsys.readouterr().err
    assert not (tmp_path / "profile").exists()


def test_a_run_that_ends_within_these_steps_leaves_no_trace_open(tmp_path, stop, capsys):
    callback = profile.make("3:7", 22, tmp_path)
    stop(5, lambda signals: run(tmp_path, signals=signals, callbacks=[callback], steps_per_dispatch=1))
    assert "WARNING: --profile=3:7: the run ended before step 7: nothing was written" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="No profile"):
        jax.profiler.stop_trace()


def test_only_training_is_profiled(plain):
    with pytest.raises(UserError, match="--profile=1:2 is for training"):
        app.parse(cifar_cnn.EXPERIMENT, [f"--workdir={plain[0]}", "--mode=eval", "--profile=1:2"])
