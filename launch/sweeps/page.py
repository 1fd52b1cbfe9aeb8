"""Renders the HTML page of a sweep: its results, a sortable table of all trials, and plots."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from html import escape
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from launch.sweeps.trials import REASON, Study
from launch.sweeps.worker import SEED_VALUES, Sweep, fields
from research.record import drawing

_MAX_CURVES, _MAX_TRIALS = 100, 1_000  # the best, in the plots; the table has all
_MAX_EPOCHS, _MAX_TICKS = 500, 20
_STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
_STYLE = """
body { font-family: sans-serif; max-width: 75rem; margin: auto; padding: 1rem }
pre { background: #eee; padding: 1rem; white-space: pre-wrap; overflow-wrap: anywhere }
.trials { max-height: 40rem; overflow: auto; margin: 1rem 0 }
table { border-collapse: collapse }
th, td { padding: 0.2rem 0.6rem; text-align: left; vertical-align: top }
thead th { position: sticky; top: 0; background: #eee; cursor: pointer; white-space: nowrap; font-size: small }
thead th::after { content: " \\2195" }
thead th[aria-sort=ascending]::after { content: " \\2191" }
thead th[aria-sort=descending]::after { content: " \\2193" }
tbody tr:nth-child(even) { background: #f6f6f6 }
td.number { text-align: right; font-variant-numeric: tabular-nums }
tr.best { font-weight: bold }
"""
# Sorts by the exact values of the column, numbers before text; empty cells are last in both directions.
_SCRIPT = """
for (const head of document.querySelectorAll("thead th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => row.cells[head.cellIndex].dataset.value;
  const compare = (a, b) => isNaN(a) || isNaN(b) ? isNaN(a) - isNaN(b) || a.localeCompare(b) : a - b;
  body.append(...[...body.rows].sort((one, other) => {
    const a = value(one), b = value(other);
    return a === "" || b === "" ? (a === "") - (b === "") : up ? compare(a, b) : compare(b, a);
  }));
};
"""


def render(study: Study, sweep: Sweep, summary: Mapping[str, Any], ranked: Sequence[FrozenTrial], command: str) -> str:
    """Returns the page, which needs no other file: plotly's JavaScript is included.

    Args:
      study: the trials.
      sweep: the settings of the sweep.
      summary: the contents of sweep.json.
      ranked: the completed trials, best first.
      command: the commands that train the best trial; "": no trial completed.
    """
    import plotly

    title = escape(str(summary["study"]))
    sections = "".join(
        f"<section>{figure.to_html(full_html=False, include_plotlyjs=False, default_width='100%')}</section>\n"
        for figure in _figures(study, sweep, ranked)
    )
    copy = "navigator.clipboard.writeText(document.getElementById('command').textContent)"
    best = f"<h2>Command of the best trial</h2>\n<pre id='command'>{escape(command)}</pre>"
    best += f'<button onclick="{copy}">copy</button>\n'
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{title}</title>\n"
        f"<style>{_STYLE}</style>\n<script>{plotly.offline.get_plotlyjs()}</script></head><body>\n"
        f"<h1>Sweep {title}</h1>\n{_results(sweep, summary)}{best if command else ''}"
        f"<h2>Trials</h2>\n<p>Click the name of a column to sort by it. Hover over a number to see all digits.</p>\n"
        f"<div class='trials'>{_table(study, sweep, ranked)}</div>\n"
        f"{sections}<script>{_SCRIPT}</script></body></html>\n"
    )


def number(value: Any) -> str:
    """Formats a value for people: a float with three significant digits, an integer with all."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{float(f'{value:.3g}'):,g}"


def _results(sweep: Sweep, summary: Mapping[str, Any]) -> str:
    counts = [f"{summary[f'num_{state}']:,} {state}" for state in ("complete", "pruned", "failed")]
    rows = {
        "experiment": summary["identity"]["experiment"],
        "search": "\n".join(summary["identity"]["search"]),
        "metric": f"{sweep.metric}, {'higher' if sweep.maximizes else 'lower'} is better",
        "trials": f"{summary['num_trials']:,}: {', '.join(counts)}",
        "time": f"{timedelta(seconds=round(summary['wall_seconds']))}, {number(summary['trials_per_minute'])} trials a "
        f"minute, {summary['num_compilations']:,} compiled programs",
    }
    if summary["best_trial"] is not None:
        seeds = ", ".join(map(number, summary["best_seed_values"]))
        rows["best trial"] = f"trial {summary['best_trial']}: {number(summary['best_value'])}" + (
            f" (mean of {seeds} over the seeds)" if sweep.seeds > 1 else ""
        )
        rows["its values"] = "\n".join(f"{name} = {number(value)}" for name, value in summary["best_params"].items())
    cells = (f"<tr><th>{escape(n)}</th><td>{escape(v).replace(chr(10), '<br>')}</td></tr>" for n, v in rows.items())
    return f"<table>{''.join(cells)}</table>\n"


def _table(study: Study, sweep: Sweep, ranked: Sequence[FrozenTrial]) -> str:
    """Returns the table of all trials that have ended: the completed ones first, best first, then the others."""
    others = [trial for trial in study.trials(*_STATES) if trial.state != TrialState.COMPLETE]
    trials = [*ranked, *others]
    columns: dict[str, Callable[[FrozenTrial], Any]] = {
        "trial": lambda trial: trial.number,
        sweep.metric: lambda trial: trial.value,
    }
    for name in dict.fromkeys(name for trial in trials for name in fields(trial)):
        columns[name] = lambda trial, name=name: fields(trial).get(name)
    if sweep.seeds > 1:
        columns["by seed"] = lambda trial: ", ".join(map(number, trial.user_attrs.get(SEED_VALUES, ())))
    columns |= {
        "epochs": lambda trial: max(trial.intermediate_values, default=None),
        "seconds": lambda trial: None if trial.duration is None else trial.duration.total_seconds(),
        # A diverged trial counts as pruned only in Optuna.
        "state": lambda trial: "failed" if REASON in trial.user_attrs else _STATES[trial.state],
    }
    if any(REASON in trial.user_attrs for trial in trials):
        columns["reason"] = lambda trial: trial.user_attrs.get(REASON)
    rows = (
        f"<tr{' class=best' if ranked and trial is ranked[0] else ''}>"
        f"{''.join(_cell(value(trial)) for value in columns.values())}</tr>\n"
        for trial in trials
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{''.join(rows)}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return "<td data-value=''></td>"
    exact, text = escape(str(value)), escape(number(value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td data-value='{exact}'>{text}</td>"
    return f"<td data-value='{exact}' title='{exact}' class='number'>{text}</td>"


def _figures(study: Study, sweep: Sweep, ranked: Sequence[FrozenTrial]) -> Iterator[Any]:
    """Yields the plots; one that fails is left out, with a warning."""
    drawing.import_matplotlib()  # which `optuna.visualization` imports
    from optuna import visualization

    draws: dict[str, Callable[[], Any]] = {"learning curves": lambda: _learning_curves(study, sweep, ranked)}
    if len(ranked) > 1 and any(trial.params for trial in ranked):
        label: Any = {"target_name": sweep.metric}
        shown = _best_of(study, ranked)
        draws["history"] = lambda: visualization.plot_optimization_history(shown, **label)
        draws["parallel coordinates"] = lambda: visualization.plot_parallel_coordinate(shown, **label)
        draws["slices"] = lambda: visualization.plot_slice(shown, **label)
        if len({trial.value for trial in ranked}) > 1:
            draws["importances"] = lambda: visualization.plot_param_importances(shown, **label)
    for name, draw in draws.items():
        if figure := drawing.attempt(f"the sweep's plot of {name} was not drawn", draw):
            yield figure.update_yaxes(hoverformat=".3g").update_xaxes(exponentformat="e")


def _best_of(study: Study, ranked: Sequence[FrozenTrial]) -> Any:
    """Returns Optuna's study, or a copy with only as many of the best trials as plots can show."""
    if len(ranked) <= _MAX_TRIALS:
        return study.optuna
    import optuna

    best = optuna.create_study(direction=study.optuna.direction, study_name=f"the {_MAX_TRIALS:,} best trials")
    best.add_trials(ranked[:_MAX_TRIALS])
    return best


def _learning_curves(study: Study, sweep: Sweep, ranked: Sequence[FrozenTrial]) -> Any:
    from plotly import graph_objects

    others = [trial for trial in study.trials() if trial.state != TrialState.COMPLETE]
    trials = [trial for trial in [*ranked, *others] if trial.intermediate_values]
    figure = graph_objects.Figure()
    longest = 1
    for trial in trials[:_MAX_CURVES]:
        epochs = sorted(trial.intermediate_values)
        longest = max(longest, epochs[-1])
        epochs = epochs[:: -(len(epochs) // _MAX_EPOCHS + 1)][::-1]
        figure.add_scatter(
            x=epochs,
            y=[trial.intermediate_values[epoch] for epoch in epochs],
            name=f"trial {trial.number}",
            mode="lines+markers",
        )
    which = "all" if len(trials) <= _MAX_CURVES else f"the {_MAX_CURVES} best of {len(trials):,}"
    return figure.update_layout(
        title=f"Learning curves of {which} trials",
        showlegend=False,
        # For few epochs plotly would mark halves; for more it finds round numbers.
        xaxis={"title": "epoch", "dtick": 1 if longest <= _MAX_TICKS else None},
        yaxis={"title": sweep.metric},
    )
