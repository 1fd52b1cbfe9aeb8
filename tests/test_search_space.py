"""What `launch.sweep` varies: ranges, lists and Python files, checked before the first trial."""

import pytest

optuna = pytest.importorskip("optuna", reason="the extra `sweep` is not installed")

from experiments import cifar_cnn  # noqa: E402
from launch.sweeps import search_space  # noqa: E402
from research import flags  # noqa: E402
from research.errors import UserError  # noqa: E402

RATE = "optimizer.learning_rate"


def _parse(*texts):
    return search_space.parse(texts, cifar_cnn.get_config())


BAD_SPACES = {
    "optimizer.learning_rat=log(1,2)": "did you mean optimizer.learning_rate",
    "model.width=int(16,4)": "from 16 to 4 is reversed",
    f"{RATE}=float(1,1)": "is empty",
    f"{RATE}=log(0,1)": "a logarithmic range must be above 0",
    f"{RATE}=log(-1,1)": "a logarithmic range must be above 0",
    f"{RATE}=log(1e-4,x)": "'x' is not of type float",
    f"{RATE}=float(0,1,step=0.3)": "is not a multiple of the step",
    f"{RATE}=1": "expected log",
    "model.width=float(1,2)": "use int or log",
    "model.dropout=float(0,1.5)": "model.dropout=1.5: must be below 1",
    "optimizer.name=[sgd,sdg]": "'sdg': use one of",
    "optimizer.name=[]": "one or more different values",
    "mirror=[maybe]": "'maybe' is not of type bool",
    "mesh.fsdp=[1,2]": "it says where the trials of a sweep train",
    "no_such_file.py": "must define a working `def search(trial)`",
}


@pytest.mark.parametrize("text", BAD_SPACES)
def test_a_space_that_cannot_be_searched_is_named(text):
    with pytest.raises(UserError) as error:
        _parse(text)
    assert text.partition("=")[0] in str(error.value)
    assert BAD_SPACES[text] in str(error.value)


def test_a_grid_is_all_combinations_and_keeps_types():
    space = _parse("model.width=int(8,24,step=8)", f"{RATE}=[1e-2,1]", "mirror=[true,false]", "label_smoothing=[0.1]")
    grid = space.grid()
    assert len(grid) == len({tuple(point.items()) for point in grid}) == 12
    assert {type(value) for point in grid for value in point.values()} == {int, float, bool}
    assert {point["model.width"] for point in grid} == {8, 16, 24}
    with pytest.raises(UserError, match="has no steps"):
        _parse(f"{RATE}=log(1e-4,1)").grid()


def test_a_python_file_searches_and_is_checked(tmp_path):
    path = tmp_path / "search.py"
    path.write_text(
        "def search(trial):\n"
        f"    rate = trial.suggest_float('{RATE}', 1e-3, 1e-1, log=True)\n"
        "    name = trial.suggest_categorical('optimizer.name', ['sgd', 'momentum'])\n"
        f"    values = {{'{RATE}': rate, 'optimizer.name': name}}\n"
        "    return values if name == 'sgd' else values | {'optimizer.momentum': trial.suggest_float('m', 0.5, 0.9)}\n"
    )
    space = _parse(str(path))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    draws = [space.suggest(study.ask()) for _ in range(10)]
    assert {len(draw) for draw in draws} == {2, 3}
    path.write_text("def search(trial):\n    trial.suggest_float('no_field', 0, 1)\n")
    with pytest.raises(UserError, match="no field no_field"):
        _parse(str(path))


def test_an_optional_field_may_be_none(tmp_path):
    """None is the default of the update rule; the command of the best trial repeats it."""
    (tmp_path / "search.py").write_text(
        "def search(trial):\n"
        "    return {'optimizer.momentum': None, 'optimizer.learning_rate': trial.suggest_float('r', 0.1, 1)}\n"
    )
    space = _parse(str(tmp_path / "search.py"))
    assert space.suggest(optuna.create_study().ask())["optimizer.momentum"] is None
    assert [point[RATE] for point in _parse(f"{RATE}=[None,0.5]").grid()] == [None, 0.5]
    momentum = ["--config.optimizer.momentum=0.5"]
    assert flags.parse(cifar_cnn.EXPERIMENT, momentum).config.optimizer.momentum == 0.5
    default = flags.parse(cifar_cnn.EXPERIMENT, [*momentum, "--config.optimizer.momentum=None"])
    assert default.config.optimizer.momentum is None
    (tmp_path / "search.py").write_text("def search(trial):\n    return {'label_smoothing': None}\n")
    with pytest.raises(UserError, match="label_smoothing=None is not of type float"):
        _parse(str(tmp_path / "search.py"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"def search(trial):\n    return {{'{RATE}': [1]}}", "is not of type float"),
        ("def search(trial):\n    return {1: 2}", "no field 1"),
        ("def search(trial):\n    pass", "varies nothing: call trial.suggest_"),
        ("raise SystemExit(0)", "must define a working `def search"),
    ],
)
def test_a_python_file_that_cannot_be_searched_is_named(text, words, tmp_path):
    (tmp_path / "search.py").write_text(text)
    with pytest.raises(UserError, match=words):
        _parse(str(tmp_path / "search.py"))
