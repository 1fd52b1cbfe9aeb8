"""Workers of a sweep: their devices and places, the storage that they share, and other launchers that run them."""

import os

import pytest

optuna = pytest.importorskip("optuna", reason="the extra `sweep` is not installed")


from launch import job as job_lib  # noqa: E402
from launch import sweep, tpu  # noqa: E402
from launch.local import LocalOptions  # noqa: E402
from launch.sweeps import processes  # noqa: E402
from launch.sweeps.trials import open_storage  # noqa: E402
from research.errors import UserError  # noqa: E402

RATE = "optimizer.learning_rate"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        ({"JAX_LOCAL_DEVICE_IDS": "1"}, {"CUDA_VISIBLE_DEVICES": "1"}),
        ({"JAX_LOCAL_DEVICE_IDS": "5", "CUDA_VISIBLE_DEVICES": "4,6"}, {"CUDA_VISIBLE_DEVICES": "6"}),
        ({"JAX_LOCAL_DEVICE_IDS": "1", "CUDA_VISIBLE_DEVICES": ""}, {}),
        ({"SLURM_LOCALID": "2", "JAX_COORDINATOR_ADDRESS": "a:1"}, {"CUDA_VISIBLE_DEVICES": "2"}),
        ({"SLURM_LOCALID": "2"}, {}),  # a user's own shell within Slurm has all its GPUs
        ({"SLURM_LOCALID": "1", "JAX_COORDINATOR_ADDRESS": "a:1", "CUDA_VISIBLE_DEVICES": "0"}, {}),  # bound by Slurm
    ],
)
def test_a_worker_takes_the_gpu_that_its_launcher_meant(environment, expected, tmp_path, monkeypatch):
    for number in range(4):
        (tmp_path / f"gpus/{number}").mkdir(parents=True)
    monkeypatch.setattr(processes, "_GPUS", tmp_path / "gpus")
    assert processes.gpu_of_worker(environment) == expected


def test_a_worker_reads_its_place_before_jax_starts(monkeypatch):
    monkeypatch.setattr(processes, "gpu_of_worker", lambda _: {"MESHWORK_PLACE": "taken"})
    monkeypatch.setenv("MESHWORK_PLACE", "none")
    job = job_lib.parse("sweep", "", sweep.SweepOptions(), ["linear", f"--search={RATE}=log(1e-4,1)"])
    sweep._sweep(job)
    assert os.environ["MESHWORK_PLACE"] == "taken"


def test_the_runs_of_a_trial_are_no_more_than_train_together():
    flags = ["linear", f"--search={RATE}=log(1e-4,1)", "--seeds=9"]
    job = job_lib.parse("sweep", "", sweep.SweepOptions(), flags)
    assert sweep._sweep(job)[0].size >= 9
    job.options.population = 8
    with pytest.raises(UserError, match="give at least --population=9"):
        sweep._sweep(job)


def test_a_worker_has_the_devices_of_its_own_process(monkeypatch):
    import jax

    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    job = job_lib.parse("sweep", "", sweep.SweepOptions(), ["linear", f"--search={RATE}=log(1e-4,1)"])
    assert sweep._sweep(job)[0].devices == one


@pytest.mark.parametrize("url", ["sqlite:////no/such/folder/x.db", "nonsense://user:secret@host/x"])
def test_a_storage_out_of_reach_is_named_without_its_password(url, tmp_path):
    with pytest.raises(UserError, match="cannot be reached") as error:
        open_storage(url, tmp_path)
    assert "secret" not in str(error.value)


def test_a_journal_that_is_none_is_named(tmp_path):
    (tmp_path / "journal.log").write_text("no\njournal\n")
    with pytest.raises(UserError, match=f"--storage={tmp_path}/journal.log cannot be reached: .*; give another"):
        open_storage("", tmp_path)


def test_other_launchers_run_workers():
    argv = ["launch.sweep", "experiments.cifar_cnn", "--processes=3", f"--search={RATE}=log(1e-4,1)", "--workdir=x"]
    job = job_lib.parse("local", "", LocalOptions(), [*argv, "--storage=sqlite:///x.db", "--config.num_epochs=2"])
    assert job.options.processes == 3
    assert job.config.num_epochs == 2
    module = job.command[1:4]
    assert module == ["-m", "launch.sweep", "experiments.cifar_cnn"]
    assert {"--processes=0", "--storage=sqlite:///x.db", f"--search={RATE}=log(1e-4,1)"} <= set(job.args)
    with pytest.raises(UserError, match="give it a URL that they can reach"):  # before a machine is rented
        job_lib.parse("tpu", "", tpu.TpuOptions(), [*argv[:2], argv[3], "--workdir=gs://b/x"])
