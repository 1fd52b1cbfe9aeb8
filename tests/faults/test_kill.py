"""kill -9 at any moment: the resumed run ends with the same bits, and every step has one line."""

import json
import os
import random
import shutil

import pytest

COMMON = ["--config.batch_size=96", "--config.log_every_steps=1", "--config.checkpoint_every_steps=4"]
EXPERIMENTS = {
    "linear": ["--config.num_epochs=2", "--config.model.width=4"],
    "linear, random crops": ["--config.num_epochs=2", "--config.model.width=4", "--config.dataset.image_size=24"],
    "experiments.cifar_cnn": [
        *("--config.dataset.name=digits", "--config.num_epochs=2"),
        *("--config.model.width=4", "--config.optimizer.name=momentum"),
    ],
    "experiments.mnist_vae": [
        *("--config.dataset.name=digits", "--config.num_epochs=2", "--config.final_samples=2"),
        *("--config.model.width=8", "--config.model.latents=3", "--config.plot_every_epochs=1"),
    ],
    "experiments.char_rnn": [
        *("--config.dataset.name=pydoc", "--config.num_epochs=1", "--config.sequence_length=128"),
        *("--config.model.width=8", "--config.model.layers=1"),
    ],
}


def record(workdir):
    """The newest checkpoint's checksums, the metrics lines, and the summary without times."""
    newest = max((path for path in workdir.glob("checkpoints/*") if path.name.isdigit()), key=lambda p: int(p.name))
    summary = json.loads((workdir / "summary.json").read_text())
    return {
        "checksums": json.loads((newest / "record/metadata").read_text())["checksums"],
        "lines": (workdir / "metrics.jsonl").read_text(),
        "figures": {n: v for n, v in summary.items() if not n.endswith("_seconds") and "per_second" not in n},
    }


def _check(workdir, whole, ended):
    assert ended.code == 0, ended.output
    assert "Traceback" not in ended.output
    assert record(workdir) == whole
    steps = [json.loads(line)["step"] for line in whole["lines"].splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    shutil.rmtree(workdir)


def _kill_often(forks, name, kills, rng, **options):
    """Kills runs at random moments, at most three times each before they may finish; returns (kills, runs)."""
    folder, args = forks.folder / name, [*EXPERIMENTS[name], *COMMON]
    shutil.rmtree(folder, ignore_errors=True)

    def train(number, **fault):
        return forks.run(name.partition(",")[0], [*args, f"--workdir={folder / number}"], **options, **fault)

    first = train("whole", watch=folder)
    assert first.code == 0, first.output
    whole, seconds, done, runs = record(folder / "whole"), first.seconds, 0, 0
    while done < kills:
        runs += 1
        for _ in range(min(3, kills - done)):
            # Alternately at a random file operation (most belong to checkpoints) and after a random time.
            if done % 2:
                ended = train(f"{runs}", kill_after=seconds * rng.random())
            else:
                ended = train(f"{runs}", kill_at=rng.randint(1, first.operations), watch=folder)
            if ended.code == 0:
                seconds = ended.seconds
                break
            assert ended.code == -9, ended.output
            done += 1
        if ended.code:
            ended = train(f"{runs}")
            seconds = ended.seconds  # all programs are in the cache by now
        _check(folder / f"{runs}", whole, ended)
    return done, runs


@pytest.mark.faults
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "linear" else pytest.mark.slow) for name in EXPERIMENTS]
)
def test_killed_at_a_random_moment(name, forks):
    """Five kills each; the soak makes 50, with plots."""
    _kill_often(forks, name, 5, random.Random(os.urandom(4)))


@pytest.mark.soak
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_killed_at_fifty_random_moments(name, forks):
    kills, runs = _kill_often(forks, name, int(os.environ.get("MESHWORK_KILLS", "50")), random.Random(0), plots=True)
    print(f"{name}: {kills} kills in {runs} runs, all survived")


def _kill_at_operations(forks, choose):
    """Kills the tiny experiment before chosen file operations in its workdir; returns (kills, operations)."""
    folder = forks.folder / "drawn"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    options = {"checkpoint_every_steps": 4}
    first = forks.run("drawn:run", [folder / "whole", options], watch=folder)
    assert first.code == 0, first.output
    whole, numbers = record(folder / "whole"), choose(first.operations)
    for number in numbers:
        workdir = folder / f"{number}"
        killed = forks.run("drawn:run", [workdir, options], watch=folder, kill_at=number)
        assert killed.code == -9, (number, killed.output)
        _check(workdir, whole, forks.run("drawn:run", [workdir, options]))
    return len(numbers), first.operations


@pytest.mark.slow
@pytest.mark.faults
def test_killed_before_a_file_operation(forks):
    assert _kill_at_operations(forks, lambda count: random.sample(range(1, count + 1), 3))[1] > 50


@pytest.mark.soak
def test_killed_before_every_file_operation(forks):
    number, count = _kill_at_operations(forks, lambda count: range(1, count + 1))
    print(f"drawn: killed before {number} of {count} operations, all survived")


@pytest.mark.faults
def test_killed_before_every_file_operation_of_the_data_cache(forks):
    """A half-written entry is ignored."""
    cache, sums = forks.folder / "cache", forks.folder / "sums"
    expected = "{'image': 1501500, 'label': 3000}"
    first = forks.run("forks:fill_cache", [sums, {}], watch=cache)
    assert (first.code, sums.read_text()) == (0, expected), first.output
    for number in range(1, first.operations + 1):
        shutil.rmtree(cache / "entry", ignore_errors=True)
        sums.write_text("")
        assert forks.run("forks:fill_cache", [sums, {}], watch=cache, kill_at=number).code == -9
        again = forks.run("forks:fill_cache", [sums, {}])
        assert (again.code, sums.read_text()) == (0, expected), again.output


@pytest.mark.soak
def test_a_killed_speedrun_keeps_the_finished_runs(forks):
    """speedrun.json is replaced after every run; the last file operation releases the lock of the workdir."""
    folder = forks.folder / "speedrun"
    args = ["--config=quick", "--config.dataset.name=digits", "--config.model.width=4", "--config.num_runs=2"]
    first = forks.run("experiments.cifar_speedrun", [*args, f"--workdir={folder}"], watch=folder)
    assert first.code == 0, first.output
    for number, runs in ((first.operations - 2, 1), (first.operations - 1, 2)):
        shutil.rmtree(folder)
        args_here = [*args, f"--workdir={folder}"]
        assert forks.run("experiments.cifar_speedrun", args_here, watch=folder, kill_at=number).code == -9
        assert json.loads((folder / "speedrun.json").read_text())["num_runs"] == runs
