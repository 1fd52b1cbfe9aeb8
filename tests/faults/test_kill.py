"""kill -9 at any moment: the run that goes on ends with the same bits, and each step has one line."""

import json
import os
import random
import shutil

import pytest

COMMON = ["--config.batch_size=96", "--config.log_every_steps=1", "--config.checkpoint_every_steps=4"]
EXPERIMENTS = {
    "cifar_cnn": ["--config.dataset.name=digits", "--config.num_epochs=2", "--config.model.width=4"],
    "mnist_vae": [
        *("--config.dataset.name=digits", "--config.num_epochs=2", "--config.final_samples=2"),
        *("--config.model.width=8", "--config.model.latents=3", "--config.pictures_every_epochs=1"),
    ],
    "char_rnn": [
        *("--config.dataset.name=pydoc", "--config.num_epochs=1", "--config.sequence_length=128"),
        *("--config.model.width=8", "--config.model.layers=1"),
    ],
}


def _record(workdir):
    """What a run leaves: its newest checkpoint's checksums, its lines, and its figures without times."""
    newest = max((path for path in workdir.glob("checkpoints/*") if path.name.isdigit()), key=lambda p: int(p.name))
    summary = json.loads((workdir / "summary.json").read_text())
    return {
        "checksums": json.loads((newest / "record/metadata").read_text())["checksums"],
        "lines": (workdir / "metrics.jsonl").read_text(),
        "figures": {n: v for n, v in summary.items() if not n.endswith("_seconds") and "per_second" not in n},
    }


def _check(workdir, whole, output):
    assert _record(workdir) == whole
    steps = [json.loads(line)["step"] for line in whole["lines"].splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert "Traceback" not in output


def _kill_often(forks, name, kills, seed):
    """Kills a run at random moments until it is done, and begins anew, until there were so many kills."""
    args = [*EXPERIMENTS[name], *COMMON]
    module = f"experiments.{name}"
    shutil.rmtree(forks.folder / name, ignore_errors=True)
    code, _, _, output = forks.run(module, [*args, f"--workdir={name}/whole"])  # compiles
    assert code == 0, output
    whole = _record(forks.folder / name / "whole")
    code, seconds, _, output = forks.run(module, [*args, f"--workdir={name}/again"])
    _check(forks.folder / name / "again", whole, output)  # the same seed, the same bits
    rng, done, round_ = random.Random(seed), 0, 0
    while done < kills:
        round_ += 1
        workdir = f"{name}/{round_}"
        for _ in range(3):
            if done == kills:
                break
            code, _, _, output = forks.run(
                module, [*args, f"--workdir={workdir}"], kill_after=seconds * (1 - rng.random() ** 2)
            )
            if code == 0:
                break
            assert code == -9, output
            done += 1
        if code:
            code, _, _, output = forks.run(module, [*args, f"--workdir={workdir}"])
        assert code == 0, output
        _check(forks.folder / workdir, whole, output)
        shutil.rmtree(forks.folder / workdir)
    return done, round_


@pytest.mark.faults
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_killed_at_a_random_moment(name, forks):
    """Three kills each; the soak has 50."""
    _kill_often(forks, name, kills=3, seed=os.urandom(4).hex())


@pytest.mark.soak
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_killed_at_fifty_random_moments(name, forks):
    kills, runs = _kill_often(forks, name, kills=50, seed=0)
    print(f"{name}: {kills} kills in {runs} runs, all survived")


def _kill_at_operations(forks, chosen):
    """Kills the tiny experiment before some of the operations by which it changes its workdir."""
    folder = forks.folder / "drawn"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    options = {"checkpoint_every_steps": 4, "pictures_every_epochs": 1}
    code, _, count, output = forks.run("drawn:run", [str(folder / "whole"), options], watch=folder)
    assert code == 0, output
    whole = _record(folder / "whole")
    assert count > 50
    numbers = chosen(count)
    for number in numbers:
        workdir = folder / str(number)
        code, _, _, output = forks.run("drawn:run", [str(workdir), options], watch=folder, kill_at=number)
        assert code == -9, (number, output)
        code, _, _, output = forks.run("drawn:run", [str(workdir), options])
        assert code == 0, (number, output)
        _check(workdir, whole, output)
        shutil.rmtree(workdir)
    return len(numbers), count


@pytest.mark.faults
def test_killed_before_an_operation_on_a_file(forks):
    _kill_at_operations(forks, lambda count: random.sample(range(1, count + 1), 4))


@pytest.mark.soak
def test_killed_before_every_operation_on_a_file(forks):
    number, count = _kill_at_operations(forks, lambda count: range(1, count + 1))
    print(f"drawn: killed before {number} of {count} operations, all survived")


@pytest.mark.faults
def test_killed_at_any_operation_while_a_data_set_is_cached(forks):
    """Half an entry is none."""
    cache, sums = forks.folder / "cache", forks.folder / "sums"
    args = [str(sums), {}]
    shutil.rmtree(cache, ignore_errors=True)
    code, _, count, output = forks.run("forks:fill_cache", args, watch=cache)
    assert (code, sums.read_text()) == (0, "{'image': 1501500, 'label': 3000}"), output
    for number in range(1, count + 1):
        shutil.rmtree(cache)
        sums.write_text("")
        assert forks.run("forks:fill_cache", args, watch=cache, kill_at=number)[0] == -9
        code, _, _, output = forks.run("forks:fill_cache", args)
        assert (code, sums.read_text()) == (0, "{'image': 1501500, 'label': 3000}"), output


@pytest.mark.faults
def test_a_speedrun_that_is_killed_keeps_the_runs_before(forks):
    """speedrun.json is there as a whole, or not at all."""
    folder = forks.folder / "speedrun"
    args = ["--config=quick", "--config.dataset.name=digits", "--config.model.width=4", "--config.num_runs=2"]
    code, _, count, output = forks.run("experiments.cifar_speedrun", [*args, f"--workdir={folder}"], watch=folder)
    assert code == 0, output
    shutil.rmtree(folder)
    # The last operation renames the second run's record into place.
    killed = forks.run("experiments.cifar_speedrun", [*args, f"--workdir={folder}"], watch=folder, kill_at=count)
    assert killed[0] == -9
    assert json.loads((folder / "speedrun.json").read_text())["num_runs"] == 1
