"""`--mount`: Cloud Storage buckets as read-only folders on the machines of a run, for `launch.tpu` and `launch.gke`.

On TPU VMs, gcsfuse mounts them; on GKE, its CSI driver does. Both cache metadata without a limit, as Google recommends
for training (github.com/GoogleCloudPlatform/gcsfuse, samples): the data must not change during the run. There is no
file cache, which needs a size that fits the host; without it the kernel still caches what is read in free memory.
"""

import dataclasses
import itertools
import re
import shlex
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from research.errors import UserError

HELP = "gs://BUCKET[/DIR]:PATH: mount this bucket, or DIR in it, read-only at the absolute PATH; may be repeated"

# https://cloud.google.com/storage/docs/buckets#naming
_BUCKET_PART = r"[a-z0-9](?:[-_a-z0-9]{0,61}[a-z0-9])?"
_BUCKET = rf"(?=.{{3,222}}$)(?!\d+\.\d+\.\d+\.\d+$){_BUCKET_PART}(?:\.{_BUCKET_PART})*"

# gcsfuse's package repository, from https://cloud.google.com/storage/docs/cloud-storage-fuse/install.
_INSTALL = (
    'echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt '
    'gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null; '
    "curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | "
    "sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null; "
    # A VM that has just started may be updating itself, and then holds the locks of apt and dpkg.
    "for _ in {1..20}; do sudo apt-get update -qq && break; sleep 15; done; "
    "sudo apt-get install -qq -y -o DPkg::Lock::Timeout=300 gcsfuse"
)


@dataclasses.dataclass(frozen=True)
class Mount:
    """A bucket, or a folder in it ("" for all of it), and the absolute path at which machines see it."""

    bucket: str
    folder: str
    path: str

    @property
    def source(self) -> str:
        return f"gs://{self.bucket}/{self.folder}".rstrip("/")


def parse(texts: Sequence[str]) -> list[Mount]:
    """Parses the values of `--mount`.

    Raises:
      UserError: a value is invalid, or two paths overlap.
    """
    mounts = [_parse(text) for text in texts]
    for one, other in itertools.permutations(mounts, 2):
        if PurePosixPath(one.path).is_relative_to(other.path):
            raise UserError(f"--mount: the paths {other.path} and {one.path} overlap: give paths side by side")
    return mounts


def _parse(text: str) -> Mount:
    found = re.fullmatch(r"gs://([^/:]+)(?:/([^:]*))?:(.+)", text)
    if not found or not text.isprintable():
        raise UserError(f"--mount={text!r}: give gs://BUCKET[/DIR]:PATH, as in gs://my-bucket/tfds:/data")
    bucket, folder, path = found[1], found[2] or "", found[3].removesuffix("/")
    if not re.fullmatch(_BUCKET, bucket):
        raise UserError(
            f"--mount={text}: {bucket} is not a bucket name: at least 3 of a-z, 0-9, -, _ and ., at most 63 between "
            "dots, with a letter or digit first and last, and no IP address"
        )
    if "," in folder or (folder and not _is_normalized(folder.removesuffix("/"))):
        raise UserError(f"--mount={text}: DIR must not have empty parts, . or .. in it, nor a comma")
    if ":" in path or not path.startswith("/") or not _is_normalized(path[1:]):
        raise UserError(
            f"--mount={text}: PATH must be an absolute folder other than /, as in /data, without :, . and .."
        )
    return Mount(bucket, folder.removesuffix("/"), path)


def _is_normalized(path: str) -> bool:
    return not {"", ".", ".."} & set(path.split("/"))


def shell_command(mounts: Sequence[Mount]) -> str:
    """The command that mounts buckets on a TPU VM, where an earlier run may have mounted the same or others.

    It installs gcsfuse if it is missing. It fails if a bucket cannot be mounted, there are no files in it, or files of
    the VM would be hidden.
    """
    fail = 'fail() { echo "error: --mount on $(hostname): $*" >&2; exit 1; }'
    # In the group after ||, `set -e` ends the script at the first failure only if no && joins its commands.
    install = f"command -v gcsfuse > /dev/null || {{ {_INSTALL}; }}"
    return "; ".join(["set -eo pipefail", fail, install, *map(_mount, mounts)])


def _mount(mount: Mount) -> str:
    path, source = shlex.quote(mount.path), shlex.quote(mount.source)
    only = [f"--only-dir={mount.folder}"] if mount.folder else []
    options = ["--implicit-dirs", "--metadata-cache-ttl-secs=-1", "--stat-cache-max-size-mb=-1", "-o", "ro", *only]
    steps = [
        # An existing mount may be of another folder, have outdated metadata, or have lost its gcsfuse.
        f"fusermount -u {path} 2> /dev/null || true",
        f"sudo mkdir -p {path}",
        f'[ -z "$(ls -A {path} || echo unreadable)" ] || fail {path} "is in use or not empty: give another PATH"',
        f'sudo chown "$(id -u)" {path}',
        shlex.join(["gcsfuse", *options, mount.bucket, mount.path]),
        f'[ -n "$(ls -A {path})" ] || fail {source} "has no files that this machine can read"',
    ]
    return "; ".join(steps)


def annotations(mounts: Sequence[Mount]) -> dict[str, str]:
    """The annotations of a Kubernetes pod for which GKE adds the sidecar container that mounts the volumes."""
    # By default the sidecar has a quarter of a core, which is too slow, and 256 MiB, too little for a large cache.
    limits = {"gke-gcsfuse/cpu-limit": "0", "gke-gcsfuse/memory-limit": "0"}
    return {"gke-gcsfuse/volumes": "true", **limits} if mounts else {}


def volumes(mounts: Sequence[Mount]) -> list[dict[str, Any]]:
    """The volumes of a Kubernetes pod."""
    return [{"name": f"mount-{i}", "csi": _csi(mount)} for i, mount in enumerate(mounts)]


def _csi(mount: Mount) -> dict[str, Any]:
    options = ["implicit-dirs", "metadata-cache:ttl-secs:-1", "metadata-cache:stat-cache-max-size-mb:-1"]
    options += [f"only-dir={mount.folder}"] if mount.folder else []
    return {
        "driver": "gcsfuse.csi.storage.gke.io",
        "readOnly": True,
        "volumeAttributes": {"bucketName": mount.bucket, "mountOptions": ",".join(options)},
    }


def volume_mounts(mounts: Sequence[Mount]) -> list[dict[str, Any]]:
    """Returns the `volumeMounts` of a Kubernetes container: the path of each of the `volumes`."""
    return [{"name": f"mount-{i}", "mountPath": mount.path, "readOnly": True} for i, mount in enumerate(mounts)]
