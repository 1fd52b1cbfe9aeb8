"""`--mount` of `launch.tpu` and `launch.gke`: what is accepted, what TPU VMs do, and what Kubernetes is asked for."""

import os
import subprocess
import sys

import pytest
import yaml

from launch import gke, mounts, tpu
from launch import job as job_lib
from launch.gcloud import GcloudError
from research.errors import UserError

GKE = ["experiments.cifar_cnn", "--image=i", "--tpu=v6e:2x2", "--workdir=gs://b/x"]
RUN = ["run", "experiments.cifar_cnn", "--workdir=gs://b/x"]

# Stand-ins on a host. A mounted bucket is a symbolic link to a folder of `buckets`; a dead mount leads nowhere.
TOOLS = {
    "sudo": 'exec "$@"',
    "lsb_release": 'test "$*" = -cs && echo jammy',
    "curl": 'echo "curl $*" >> calls; test -z "$OFFLINE" && echo key',
    "tee": 'cat > "installed-${1##*/}"',
    "ls": '[ -z "$UNREADABLE" ] && exec /bin/ls "$@"',
    "sleep": 'echo "sleep $*" >> calls',
    "apt-get": """
echo "apt-get $1" >> calls
test $1 = update && exec test $(grep -c update calls) -gt "${LOCKED:-0}"
mv gcsfuse bin""",
    "fusermount": '[ -L "$2" ] && [ -z "$BUSY" ] && rm "$2" && mkdir "$2"',
}
GCSFUSE = """
printf '%s\\n' "$@" > arguments
only= last=
for argument; do
  case "$argument" in --only-dir=*) only="${argument#--only-dir=}" ;; esac
  bucket=$last last=$argument
done
test -d "buckets/$bucket" || { echo "Unknown bucket $bucket" >&2; exit 1; }
mkdir -p "buckets/$bucket/$only"
rmdir "$last" && ln -s "$PWD/buckets/$bucket/$only" "$last"
"""


@pytest.fixture
def host(tmp_path):
    """`host(*values of --mount)` runs the command of these mounts on a host that has none of the software yet."""
    (tmp_path / "bin").mkdir()
    for name, text in {**TOOLS, "../gcsfuse": GCSFUSE}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    data = tmp_path / "buckets/abc/image net"
    data.mkdir(parents=True)
    (data / "shard").write_text("records")

    def run(*texts, **environment):
        environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", **environment}
        command = mounts.shell_command(mounts.parse(texts))
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        calls = tmp_path / "calls"
        return done.returncode, done.stderr, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_a_host_installs_gcsfuse_and_mounts(host, tmp_path):
    path = tmp_path / "mnt/my data"
    code, errors, calls = host(f"gs://abc/image net/:{path}/")
    assert (code, errors) == (0, "")
    assert (path / "shard").read_text() == "records"
    assert calls == [
        "curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg",
        "apt-get update",
        "apt-get install",
    ]
    (source,) = (tmp_path / "installed-gcsfuse.list").read_text().splitlines()
    assert source.endswith("https://packages.cloud.google.com/apt gcsfuse-jammy main")
    assert (tmp_path / "installed-cloud.google.asc").read_text() == "key\n"
    assert (tmp_path / "arguments").read_text().splitlines() == [
        "--implicit-dirs",
        "--metadata-cache-ttl-secs=-1",
        "--stat-cache-max-size-mb=-1",
        *("-o", "ro"),
        "--only-dir=image net",
        "abc",
        str(path),
    ]


def test_mounts_of_an_earlier_run_are_replaced_and_gcsfuse_is_installed_once(host, tmp_path):
    path, other = tmp_path / "data", tmp_path / "other"
    assert host(f"gs://abc/image net:{path}")[0] == 0
    other.symlink_to(tmp_path / "dead")
    code, errors, calls = host(f"gs://abc:{path}", f"gs://abc/image net:{other}")
    assert (code, errors, calls.count("apt-get install")) == (0, "", 1)
    assert [name.name for name in path.iterdir()] == ["image net"]
    assert (other / "shard").exists()


def test_a_host_that_updates_itself_is_waited_for(host, tmp_path):
    code, _, calls = host(f"gs://abc:{tmp_path}/data", LOCKED="2")
    assert (code, calls[1:]) == (0, [*["apt-get update", "sleep 15"] * 2, "apt-get update", "apt-get install"])


@pytest.mark.parametrize(
    ("text", "environment", "words"),
    [
        ("gs://abc/none:{}/data", {}, "gs://abc/none has no files that this machine can read"),
        ("gs://none:{}/data", {}, "Unknown bucket none"),
        ("gs://abc:{}/buckets", {}, "/buckets is in use or not empty: give another PATH"),
        ("gs://abc:{}/bin/sudo/data", {}, "mkdir"),
        ("gs://abc:{}/data", {"UNREADABLE": "yes"}, "/data is in use or not empty"),
    ],
)
def test_a_host_that_cannot_mount_fails_before_the_next_mount(text, environment, words, host, tmp_path):
    code, errors, _ = host(text.format(tmp_path), f"gs://abc:{tmp_path}/next", **environment)
    assert code
    assert words in errors
    assert not (tmp_path / "next").exists()


def test_a_host_that_cannot_install_gcsfuse_fails_at_once(host, tmp_path):
    code, _, calls = host(f"gs://abc:{tmp_path}/data", OFFLINE="yes")
    assert code
    assert len(calls) == 1
    assert not (tmp_path / "data").exists()


def test_a_mount_that_is_in_use_stays(host, tmp_path):
    assert host(f"gs://abc/image net:{tmp_path}/data")[0] == 0
    code, errors, _ = host(f"gs://abc:{tmp_path}/data", BUSY="yes")
    assert code
    assert f"{tmp_path}/data is in use or not empty" in errors
    assert (tmp_path / "data/shard").exists()


def test_run_does_not_start_where_mounting_fails(tmp_path, monkeypatch):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexit 1\n')
    gcloud.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(GcloudError, match="see its output above"):
        tpu.run([*RUN, "--mount=gs://abc:/data"])
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert "gcsfuse" in call
    assert "experiments" not in call


def test_a_pod_has_its_volumes(capsys):
    assert gke.run([*GKE, "--mount=gs://abc/image net:/data", "--mount=gs://x.y-z_1:/x", "--dry_run"]) == 0
    (workers,) = yaml.safe_load(capsys.readouterr().out)["spec"]["replicatedJobs"]
    template = workers["template"]["spec"]["template"]
    assert template["metadata"]["annotations"] == {
        "gke-gcsfuse/volumes": "true",
        "gke-gcsfuse/cpu-limit": "0",
        "gke-gcsfuse/memory-limit": "0",
    }
    first, second = template["spec"]["volumes"]
    assert first["csi"]["driver"] == second["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert first["csi"]["readOnly"] is second["csi"]["readOnly"] is True
    cached = "implicit-dirs,metadata-cache:ttl-secs:-1,metadata-cache:stat-cache-max-size-mb:-1"
    assert first["csi"]["volumeAttributes"] == {"bucketName": "abc", "mountOptions": f"{cached},only-dir=image net"}
    assert second["csi"]["volumeAttributes"] == {"bucketName": "x.y-z_1", "mountOptions": cached}
    (container,) = template["spec"]["containers"]
    assert container["volumeMounts"] == [
        {"name": first["name"], "mountPath": "/data", "readOnly": True},
        {"name": second["name"], "mountPath": "/x", "readOnly": True},
    ]
    assert first["name"] != second["name"]


def test_a_pod_without_mounts_has_no_sidecar(capsys):
    assert gke.run([*GKE, "--dry_run"]) == 0
    assert "gcsfuse" not in capsys.readouterr().out


@pytest.mark.parametrize("bucket", ["abc", "a-b", "1_2", "a" * 63, "www.example.com", f"{'a' * 63}.{'b' * 63}"])
def test_names_that_buckets_may_have(bucket):
    assert mounts.parse([f"gs://{bucket}:/d"]) == [mounts.Mount(bucket, "", "/d")]


BAD_NAMES = ["Abc", "ab", "_ab", "ab-", "a" * 64, "a..b", "a.-b", "192.168.5.4", ".".join(["a" * 62] * 4), "äbc"]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        *(([f"gs://{name}:/d"], f"{name} is not a bucket name") for name in BAD_NAMES),
        *(([text], "give gs://BUCKET[/DIR]:PATH") for text in ("", "abc:/d", "s3://abc:/d", "gs://abc", "gs://abc/d")),
        (["gs://:/d"], "give gs://BUCKET[/DIR]:PATH"),
        (["gs://abc:"], "give gs://BUCKET[/DIR]:PATH"),
        (["gs://abc:/d\n"], "give gs://BUCKET[/DIR]:PATH"),
        *(([f"gs://abc/{folder}:/d"], "DIR must not have") for folder in ("a//b", "/", "../a", "./a", "a,b")),
        *(
            ([f"gs://abc:{path}"], "PATH must be an absolute folder")
            for path in ("d", "~/d", "/", "//d", "/a/../d", "/a:")
        ),
        (["gs://abc:/d", "gs://abc/x:/d/"], "the paths /d and /d overlap"),
        (["gs://abc:/d/e", "gs://xyz:/d"], "the paths /d and /d/e overlap"),
    ],
)
def test_bad_input_is_named(texts, words):
    with pytest.raises(UserError) as error:
        mounts.parse(texts)
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("run", "args"), [(gke.run, GKE), (tpu.run, RUN)], ids=["gke", "tpu"])
def test_launchers_refuse_bad_input_in_one_line(run, args, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch", *args, "--mount=gs://abc:/d", "--mount=gs://abc:d"])
    with pytest.raises(SystemExit) as exit_:
        job_lib.main(run)
    out, errors = capsys.readouterr()
    assert (exit_.value.code, out, len(errors.splitlines())) == (2, "", 1)
    assert "--mount=gs://abc:d: PATH must be an absolute folder" in errors


@pytest.mark.parametrize("run", [gke.run, lambda args: tpu.run(["up", *args])], ids=["gke", "tpu"])
def test_help_shows_that_it_takes_text(run, capsys):
    with pytest.raises(SystemExit):
        run(["--help"])
    assert "  --mount=str (default: none)\n" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["create", "setup", "status", "logs", "stop", "delete"])
def test_other_verbs_do_not_mount(verb):
    with pytest.raises(UserError, match=f"--mount is for `up` and `run`.*leave it out of `{verb}`"):
        tpu.run([verb, "--mount=gs://abc:/d", "--dry_run"])
