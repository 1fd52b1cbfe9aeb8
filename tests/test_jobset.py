"""What `launch.gke` applies is a JobSet by the schema of its API.

The schema is a part, by hand, of JobSet v0.12.0's jobset.x-k8s.io/v1alpha2
(github.com/kubernetes-sigs/jobset: config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml): all that the launcher
uses, with the types and the fields that must be there. The values that that file leaves to Kubernetes are those of
batch/v1 and core/v1. A field that is not listed is refused, as `kubectl apply` refuses a misspelt one.
"""

import copy

import pytest
import yaml

from launch import gke

NATURAL = range(2**31)  # int32, and Kubernetes allows none below 0 here
PORT = range(1, 2**16)

# A type; a range or a tuple: one of its values; [x]: a list of x; {"*": x}: a map of strings to x; else an object, of
# whose fields those with a "!" must be there.
CONTAINER = {
    "name!": str,
    "image!": str,  # which Kubernetes asks for where there is no other source of it
    "command": [str],
    "env": [{"name!": str, "value": str}],
    "ports": [{"containerPort!": PORT}],
    "resources": {"limits": {"*": NATURAL}},
    "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool}],
}
POD = {
    "containers!": [CONTAINER],
    "nodeSelector": {"*": str},
    "restartPolicy!": ("Never",),  # a Job may have OnFailure too, but none with a podFailurePolicy
    "serviceAccountName": str,
    "terminationGracePeriodSeconds": NATURAL,
    "volumes": [{"name!": str, "csi": {"driver!": str, "readOnly": bool, "volumeAttributes": {"*": str}}}],
}
EXIT_CODES = {"containerName": str, "operator!": ("In", "NotIn"), "values!": [range(1, 256)]}
JOB = {
    "backoffLimit": NATURAL,
    "completionMode": ("Indexed", "NonIndexed"),
    "completions": NATURAL,
    "parallelism": NATURAL,
    "podFailurePolicy": {
        "rules!": [{"action!": ("Count", "FailIndex", "FailJob", "Ignore"), "onExitCodes": EXIT_CODES}]
    },
    "template!": {"metadata": {"annotations": {"*": str}}, "spec!": POD},
}
REASONS = ("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy")
ACTIONS = (
    *("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
    *("RestartJob", "RestartJobAndIgnoreMaxRestarts"),
)
JOBSET = {
    "apiVersion!": ("jobset.x-k8s.io/v1alpha2",),
    "kind!": ("JobSet",),
    "metadata!": {"annotations": {"*": str}, "name!": str, "namespace": str},
    "spec!": {
        "failurePolicy": {
            "maxRestarts": NATURAL,
            "rules": [{"action!": ACTIONS, "name!": str, "onJobFailureReasons": [REASONS]}],
        },
        "network": {"enableDNSHostnames": bool, "subdomain": str},
        "replicatedJobs": [{"name!": str, "replicas": NATURAL, "template!": {"spec": JOB}}],
    },
}


def violations(value, schema, path="JobSet"):
    """What of a value its schema does not allow, a line each."""
    if isinstance(schema, dict) and isinstance(value, dict):
        fields = {name.rstrip("!"): of for name, of in schema.items()}
        missing = [n[:-1] for n in schema if n.endswith("!") and n[:-1] not in value]
        found = [f"{path}.{name} is missing" for name in missing]
        for name, item in value.items():
            of = fields.get("*", fields.get(name))
            found += violations(item, of, f"{path}.{name}") if of else [f"{path}.{name} is unknown"]
        return found
    if isinstance(schema, list) and isinstance(value, list):
        return [line for i, item in enumerate(value) for line in violations(item, schema[0], f"{path}[{i}]")]
    if isinstance(schema, type):
        fits = type(value) is schema
    else:  # True is no 1
        fits = isinstance(schema, range | tuple) and type(value) is type(schema[0]) and value in schema
    return [] if fits else [f"{path} is {value!r}"]


def _jobset(capsys, *args):
    what = [] if "launch.sweep" in args else ["experiments.cifar_cnn"]
    assert gke.run([*what, *args, "--image=i:1", "--workdir=gs://b/x", "--dry_run"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


SWEEP = ("launch.sweep", "experiments.cifar_cnn", "--storage=postgresql://h/d", "--search=seed=int(0,9)")


@pytest.mark.parametrize(
    "args",
    [
        ("--tpu=v6e:4x4",),
        ("--tpu=v5e:2x2", "--slices=3", "--spot", "--max_restarts=0"),
        ("--tpu=tpu7x:2x2x2", "--name=t", "--namespace=true", "--service_account=1"),
        ("--gpu=nvidia-h100-80gb", "--nodes=2", "--gpus_per_node=4", "--spot"),
        (*SWEEP, "--gpu=1"),
        ("--tpu=v6e:4x4", "--mount=gs://abc:/data", "--mount=gs://123/x:/x"),
    ],
)
def test_it_is_a_jobset(args, capsys):
    assert violations(_jobset(capsys, *args), JOBSET) == []


def test_the_longest_name_leaves_room_for_those_of_its_pods(capsys):
    """JobSet refuses one whose pods' names, as here, would have more than 63 letters."""
    found = _jobset(capsys, "--tpu=v5p:16x16x24", "--slices=999", f"--name={'n' * 40}")
    (workers,) = found["spec"]["replicatedJobs"]
    last = workers["template"]["spec"]["completions"] - 1
    assert len(f"{found['metadata']['name']}-{workers['name']}-{workers['replicas'] - 1}-{last}-abcde") <= 63


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("spec.replicas", 1, ".spec.replicas is unknown"),
        ("spec.failurePolicy.maxRestarts", "10", ".maxRestarts is '10'"),
        ("spec.failurePolicy.maxRestarts", True, ".maxRestarts is True"),
        ("spec.failurePolicy.maxRestarts", -1, ".maxRestarts is -1"),
        ("spec.failurePolicy.rules.0.action", "Fail", "rules[0].action is 'Fail'"),
        ("spec.failurePolicy.rules.0.name", None, "rules[0].name is missing"),
        ("spec.network.enableDNSHostnames", "true", ".enableDNSHostnames is 'true'"),
        ("spec.replicatedJobs.0.template.spec.template.spec.nodeSelector.spot", True, ".nodeSelector.spot is True"),
        ("spec.replicatedJobs.0.template.spec.template.spec.containers", {}, ".containers is {}"),
        ("metadata.name", None, ".metadata.name is missing"),
    ],
)
def test_what_is_none_is_found(path, value, said, capsys):
    found = _jobset(capsys, "--tpu=v6e:4x4")
    *folders, name = path.split(".")
    place = broken = copy.deepcopy(found)
    for folder in folders:
        place = place[int(folder) if folder.isdecimal() else folder]
    if value is None:
        del place[name]
    else:
        place[name] = value
    (line,) = violations(broken, JOBSET)
    assert line.endswith(said)
