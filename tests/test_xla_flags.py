"""XLA flags are added only for measured versions of jaxlib."""

import pytest

from research.process import xla_flags

FLAG = "--xla_cpu_experimental_ynn_fusion_type"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, f"{FLAG}=LIBRARY_FUSION_TYPE_REDUCE"),
        ("--xla_dump_to=/tmp/x", f"--xla_dump_to=/tmp/x {FLAG}=LIBRARY_FUSION_TYPE_REDUCE"),
        (f"{FLAG}=", f"{FLAG}="),
    ],
)
def test_a_flag_is_appended_unless_the_user_sets_it(monkeypatch, given, expected):
    monkeypatch.setattr(xla_flags, "version", lambda package: "0.10.2")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if given is not None:
        monkeypatch.setenv("XLA_FLAGS", given)
    xla_flags.set_flags()
    assert xla_flags.os.environ["XLA_FLAGS"] == expected


def test_an_unmeasured_jaxlib_gets_no_flags(monkeypatch):
    monkeypatch.setattr(xla_flags, "version", lambda package: "99.0")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    xla_flags.set_flags()
    assert "XLA_FLAGS" not in xla_flags.os.environ
