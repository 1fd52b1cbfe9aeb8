"""The reference of fields and commands, generated from their declarations when the site is built."""

import contextlib
import dataclasses
import importlib
import inspect
import io
import pkgutil
from collections.abc import Iterable, Iterator
from typing import Any

import experiments
from research.config import Config
from research.config_fields import walk

EXPERIMENTS = sorted(module.name for module in pkgutil.iter_modules(experiments.__path__))
COMMANDS = ("sweep", "plan", "scaling", "local", "slurm", "tpu", "gke", "export", "predict")
_BOUNDS = {"minimum": "≥ {}", "above": "> {}", "maximum": "≤ {}", "below": "< {}"}
_TYPES = {float | None: "float", tuple[str, ...]: "str, repeatable"}


def setup(app: Any) -> None:
    """Makes this module an extension of Sphinx."""
    app.connect("source-read", _append)


def _append(app: Any, page: str, source: list[str]) -> None:
    """Appends the generated text to the source of the pages that have some."""
    del app
    generated = {"docs/reference/config": config_page, "docs/reference/commands": commands_page}
    if page in generated:
        source[0] += "\n" + "\n".join(generated[page]()) + "\n"


def config_page() -> Iterator[str]:
    """Yields the lines of the page: the fields of `Config` by group, then what each experiment adds or changes."""
    shared = {path: value for path, _, value in walk(Config())}
    yield from ("## Every experiment", "", *_groups(Config()))
    for name in EXPERIMENTS:
        experiment = importlib.import_module(f"experiments.{name}").EXPERIMENT
        config = experiment.default_config
        presets = ", ".join(f"`--config={preset}`" for preset in experiment.presets)
        yield from (f"## {name}", "", f"Presets: {presets}. The defaults are those of the first.", "")
        yield from _groups(config, known=shared)
        changed = [(path, field, value) for path, field, value in walk(config) if shared.get(path, value) != value]
        yield from ("These fields of every experiment have other defaults:", "", *_table(changed, "config."))
        if experiment.sample_options:
            yield from ("With `--mode=sample`:", "", *_table(walk(experiment.sample_options())))


def commands_page() -> Iterator[str]:
    """Yields the lines of the page: what `--help` of each command prints."""
    for name in COMMANDS:
        module, text = importlib.import_module(f"launch.{name}"), io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            module.run(["--help"])
        yield from (f"## launch.{name}", "", "```text", text.getvalue().strip(), "```", "")


def _groups(config: Any, prefix: str = "", known: Iterable[str] = ()) -> Iterator[str]:
    """Yields a heading, the docstring and a table for a config and each config in it; `known` fields are left out."""
    names = [field.name for field in dataclasses.fields(config)]
    own = [(p, f, v) for p, f, v in walk(config, prefix) if p not in known and "." not in p.removeprefix(prefix)]
    if own:
        title = f"`--config.{prefix}*`" if prefix else "`--config.*`"
        doc = inspect.getdoc(type(config)) or ""
        yield from (f"### {title}", "", f"{doc.splitlines()[0]}", "", *_table(own, "config."))
    for name in names:
        if dataclasses.is_dataclass(group := getattr(config, name)):
            yield from _groups(group, f"{prefix}{name}.", known)


def _table(rows: Iterable[tuple[str, dataclasses.Field, Any]], prefix: str = "") -> Iterator[str]:
    yield from ("| flag | values | meaning |", "| --- | --- | --- |")
    for path, field, value in rows:
        default = {"": "empty", (): "none", None: "see meaning"}.get(value, f"`{value}`")
        cells = (f"`--{prefix}{path}`", f"{_values(field)}; default {default}", field.metadata["help"])
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _values(field: dataclasses.Field) -> str:
    if choices := field.metadata["choices"]:
        return ", ".join(f"`{choice}`" if choice else "empty" for choice in choices)
    found = ((words, field.metadata[name]) for name, words in _BOUNDS.items())
    kind = _TYPES.get(field.type, getattr(field.type, "__name__", ""))
    return ", ".join([kind, *(words.format(bound) for words, bound in found if bound is not None)])
