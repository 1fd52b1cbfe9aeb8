"""Text files are read and written as UTF-8 in every locale."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [path for name in ("research", "experiments", "launch", "benchmarks") for path in (ROOT / name).rglob("*.py")]
# Functions of other modules that are called `open` but do not open text files.
OTHER = ("Image.open", "os.open", "gzip.open", "tarfile.open", "self._open", "self._client.open", "webbrowser.open")


def _calls_in_the_locales_encoding(source):
    """The lines of calls that open a text file without an encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        name = function.rpartition(".")[2]
        if name == "open" and function not in OTHER:
            arguments = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
            is_text = not any(isinstance(arg, ast.Constant) and "b" in str(arg.value) for arg in arguments)
        else:
            is_text = name in ("read_text", "write_text")
        if is_text and not any(keyword.arg == "encoding" for keyword in node.keywords):
            yield node.lineno


@pytest.mark.parametrize(
    ("call", "is_found"),
    [
        ("path.read_text()", True),
        ("path.write_text(x)", True),
        ("open(name)", True),
        ("path.open('w')", True),
        ("path.open('w', encoding='utf-8')", False),
        ("open(name, 'rb')", False),
        ("open(name, mode='xb')", False),
        ("path.read_text(encoding='utf-8')", False),
    ],
)
def test_the_check_finds_them(call, is_found):
    assert bool(list(_calls_in_the_locales_encoding(call))) == is_found


def test_no_file_is_read_in_the_locales_encoding():
    assert len(FILES) > 100
    found = [f"{path}:{line}" for path in FILES for line in _calls_in_the_locales_encoding(path.read_text("utf-8"))]
    assert not found, found
