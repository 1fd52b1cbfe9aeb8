"""`launch.gke` renders what GKE's documentation asks for, and hands it to kubectl."""

import pytest
import yaml

from launch import gke
from research.errors import UserError

ARGS = ["experiments.cifar_cnn", "--image=i:1", "--workdir=gs://b/x", "--config.batch_size=512"]


def _rendered(capsys, *args):
    assert gke.run([*ARGS, *args, "--dry_run"]) == 0
    spec = yaml.safe_load(capsys.readouterr().out)["spec"]
    (workers,) = spec["replicatedJobs"]
    job = workers["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    return spec, workers, job, job["template"]["spec"]


@pytest.mark.parametrize(
    ("tpu", "label", "nodes", "chips"),
    [
        ("v5e:4x4", "tpu-v5-lite-podslice", 4, 4),
        ("v6e:2x2", "tpu-v6e-slice", 1, 4),
        ("v6e:16x16", "tpu-v6e-slice", 64, 4),
        ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
        ("v5p:8x16x16", "tpu-v5p-slice", 512, 4),
        ("tpu7x:2x2x2", "tpu7x", 2, 4),
    ],
)
def test_a_tpu_slice_has_its_nodes_and_chips(tpu, label, nodes, chips, capsys):
    _, workers, job, pod = _rendered(capsys, f"--tpu={tpu}", "--slices=3")
    assert (workers["replicas"], job["parallelism"]) == (3, nodes)
    topology = tpu.partition(":")[2]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": chips}}
    assert container["command"] == [
        *("python", "-m", "experiments.cifar_cnn", "--config.batch_size=512", "--workdir=gs://b/x"),
        "--config.distributed.start=always",
    ]


def test_gpu_nodes_find_each_other_and_options_are_there(capsys):
    more = ["--name=t", "--nodes=2", "--gpus_per_node=4", "--spot", "--service_account=sa", "--max_restarts=3"]
    spec, _, job, pod = _rendered(capsys, "--gpu=nvidia-h100-80gb", "--namespace=ns", *more)
    rule = {"name": "nonRetryable", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert spec["failurePolicy"] == {"maxRestarts": 3, "rules": [rule]}
    assert spec["network"] == {"enableDNSHostnames": True, "subdomain": "t"}
    assert (job["parallelism"], pod["serviceAccountName"]) == (2, "sa")
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    (container,) = pod["containers"]
    place = {entry["name"]: entry["value"] for entry in container["env"]}
    assert place == {"JAX_COORDINATOR_ADDRESS": "t-workers-0-0.t:8476", "JAX_NUM_PROCESSES": "2"}
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 4}}


def test_what_another_try_would_not_change_fails_the_job(capsys):
    _, _, job, pod = _rendered(capsys, "--tpu=v6e:4x4")
    codes = {"containerName": pod["containers"][0]["name"], "operator": "In", "values": [2, 3, 4, 5, 6]}
    assert job["podFailurePolicy"] == {"rules": [{"action": "FailJob", "onExitCodes": codes}]}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give either --tpu=TYPE:TOPOLOGY or --gpu=TYPE"),
        (["--tpu=v6e:4x4", "--gpu=x"], "give either --tpu"),
        (["--tpu=v9:4x4"], "--tpu=v9:4x4: give one of v4, v5e"),
        (["--tpu=v6e-16"], "as in v6e:4x4"),
        (["--tpu=v6e:0x4"], "--tpu=v6e:0x4: a slice of v6e has 2 dimensions"),
        (["--tpu=v6e:2x2x2"], "a slice of v6e has 2 dimensions"),
        (["--tpu=v5p:4x4"], "a slice of v5p has 3 dimensions"),
        (["--tpu=v5e:5x5"], "one chip or a multiple of 4"),
        (["--tpu=v6e:1x3"], "one chip or a multiple of 4"),
        (["--tpu=v6e:64x64"], "a multiple of 4, at most 256"),
        (["--gpu=x", "--slices=2"], "--slices=2 does not apply to --gpu, where --nodes"),
        (["--tpu=v6e:4x4", "--nodes=2"], "--nodes=2 does not apply to --tpu, where the topology and --slices"),
        (["--tpu=v6e:4x4", "--gpus_per_node=4"], "--gpus_per_node=4 does not apply to --tpu"),
        (["--tpu=v6e:4x4", "--name=No_Name"], "at most 40 characters of a-z"),
        (["--tpu=v6e:4x4", f"--name={'n' * 41}"], "at most 40 characters of a-z"),
        (["--tpu=v6e:4x4", "--image="], "the container image"),
        (["--tpu=v6e:4x4", "--workdir=here"], "give gs://BUCKET/FOLDER"),
    ],
)
def test_bad_input_is_named(args, words):
    with pytest.raises(UserError, match=words):
        gke.run([*ARGS, *args])


def test_a_sweep_without_a_storage_is_named():
    with pytest.raises(UserError, match="need only the --storage: give it a URL that they can reach"):
        gke.run(["launch.sweep", *ARGS, "--tpu=v6e:4x4"])


def test_it_is_created_by_kubectl(monkeypatch, tmp_path, capfd):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text('#!/bin/sh\necho "$@"; cat; test -z "$THERE"\n')
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gke.run([*ARGS, "--tpu=v6e:4x4"]) == 0
    first, _, rest = capfd.readouterr().out.partition("\n")
    assert first == "create -f -"
    assert yaml.safe_load(rest)["kind"] == "JobSet"
    monkeypatch.setenv("THERE", "yes")
    assert gke.run([*ARGS, "--tpu=v6e:4x4", "--name=n"]) == 1
    assert "delete it with `kubectl delete jobset n --namespace=default`" in capfd.readouterr().err
