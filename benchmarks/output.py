"""Where a benchmark's results go: the flag `--out`."""

from pathlib import Path

from absl import flags

_OUT = flags.DEFINE_string("out", str(Path(__file__).parent / "results"), "folder of the results")


def folder() -> Path:
    """The folder; ends the process with one line where it is none."""
    out = Path(_OUT.value)
    if not out.is_dir():
        raise SystemExit(f"error: --out={out} is not a folder")
    return out
