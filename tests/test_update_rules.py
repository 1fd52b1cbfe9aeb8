"""The update rules equal their published equations in NumPy, and PyTorch's implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import optimizers
from research.config import OptimizerConfig

STEPS = 10
RNG = np.random.default_rng(0)
PARAMS = {"kernel": RNG.standard_normal((3, 4)), "bias": RNG.standard_normal(4)}
GRADS = [{name: RNG.standard_normal(p.shape) for name, p in PARAMS.items()} for _ in range(STEPS)]
RATE, MOMENTUM = 0.03, 0.8


def _scaled_grads(scale):
    return [{name: scale * g for name, g in grads.items()} for grads in GRADS]


def _float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def _made(**fields):
    config = OptimizerConfig(**fields)
    config = optimizers.resolve(config)
    return optimizers.make_optimizer(config, optimizers.boundaries(config, STEPS))


def _train(tx, params, grads):
    params = _float32(params)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for g in grads:
        params, opt_state = step(params, opt_state, _float32(g))
    return params


def _ours(scale, **fields):
    """Runs ten steps with parameters and gradients multiplied by `scale`."""
    params = {name: scale * p for name, p in PARAMS.items()}
    return _train(_made(**fields), params, _scaled_grads(scale))


def _assert_same_change(ours, expected, scale):
    """Compares to float32's rounding, relative to the distance moved, so that tiny gradients count equally."""
    for key, theirs in expected.items():
        distance = np.abs(theirs - scale * PARAMS[key]).max()
        error = np.abs(np.asarray(ours[key], np.float64) - theirs).max()
        assert error < 2e-5 * distance + 2e-6 * scale, key


# Each rule in NumPy float64: (gradient, state, step from 1) -> (update before the learning rate, state).


def sgd(g, memory, t):
    return g, None


def momentum(g, v, t):
    v = MOMENTUM * (0 if v is None else v) + g
    return v, v


def nesterov(g, v, t):
    v = MOMENTUM * (0 if v is None else v) + g
    return g + MOMENTUM * v, v


def adagrad(g, s, t):
    """Duchi et al. 2011, figure 1: divided by the root of the sum of all squares so far."""
    s = (0 if s is None else s) + g**2
    return g / (np.sqrt(s) + 1e-10), s


def rmsprop(g, memory, t):
    """Hinton 2012, lecture 6e, with PyTorch's decay, epsilon and momentum."""
    nu, v = memory or (0, 0)
    nu = 0.99 * nu + 0.01 * g**2
    v = MOMENTUM * v + g / (np.sqrt(nu) + 1e-8)
    return v, (nu, v)


def adam(g, memory, t):
    """Kingma & Ba 2015, algorithm 1."""
    m, nu = memory or (0, 0)
    m, nu = MOMENTUM * m + (1 - MOMENTUM) * g, 0.999 * nu + 0.001 * g**2
    return (m / (1 - MOMENTUM**t)) / (np.sqrt(nu / (1 - 0.999**t)) + 1e-8), (m, nu)


def lion(g, m, t):
    """Chen et al. 2023, algorithm 2."""
    m = np.zeros_like(g) if m is None else m
    return np.sign(MOMENTUM * m + (1 - MOMENTUM) * g), 0.99 * m + 0.01 * g


def muon(g, memory, t):
    """Jordan 2024, with Optax's bias correction; biases use Nesterov's Adam (Dozat 2016) at a tenth of the rate."""
    if g.ndim == 1:
        m, nu = memory or (0, 0)
        m, nu = 0.9 * m + 0.1 * g, 0.999 * nu + 0.001 * g**2
        ahead = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
        return 0.1 * ahead / (np.sqrt(nu / (1 - 0.999**t)) + 1e-8), (m, nu)
    m = MOMENTUM * (0 if memory is None else memory) + (1 - MOMENTUM) * g
    ahead = MOMENTUM * m / (1 - MOMENTUM ** (t + 1)) + (1 - MOMENTUM) * g / (1 - MOMENTUM**t)
    x = ahead / (np.linalg.norm(ahead) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return max(1, g.shape[1] / g.shape[0]) ** 0.5 * x, m


EQUATIONS = {
    "sgd": sgd,
    "momentum": momentum,
    "nesterov": nesterov,
    "adagrad": adagrad,
    "rmsprop": rmsprop,
    "adam": adam,
    "adamw": adam,
    "lion": lion,
    "muon": muon,
}


def _expected(name, scale, weight_decay):
    params = {key: scale * value for key, value in PARAMS.items()}
    memory = dict.fromkeys(params)
    for t, grads in enumerate(_scaled_grads(scale), start=1):
        for key, g in grads.items():
            decay = weight_decay * params[key] if key == "kernel" else 0.0
            decoupled = name in ("adamw", "lion", "muon")
            update, memory[key] = EQUATIONS[name](g if decoupled else g + decay, memory[key], t)
            params[key] -= RATE * (update + decay if decoupled else update)
    return params


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", EQUATIONS)
def test_ten_steps_equal_the_equations(name, weight_decay, scale):
    has_momentum = name not in ("sgd", "adagrad")
    fields = {"momentum": MOMENTUM} if has_momentum else {}
    ours = _ours(scale, name=name, learning_rate=RATE, weight_decay=weight_decay, **fields)
    _assert_same_change(ours, _expected(name, scale, weight_decay), scale)


# The optimizers of torch.optim, with their defaults except for the learning rate.
TORCH = {
    "sgd": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "adagrad": ("Adagrad", {}),
    "rmsprop": ("RMSprop", {}),
    "adam": ("Adam", {}),
    "adamw": ("AdamW", {}),
}


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("weight_decay", [None, 0.1])
@pytest.mark.parametrize(("name", "momentum"), [*((name, None) for name in TORCH), ("rmsprop", 0.9)])
def test_ten_steps_equal_pytorch(name, momentum, weight_decay, scale):
    """PyTorch runs in float64, with kernels and biases in two groups, since it would decay biases too."""
    torch = pytest.importorskip("torch")
    kind, options = TORCH[name]
    given = {key: value for key, value in (("momentum", momentum), ("weight_decay", weight_decay)) if value is not None}
    params = {key: torch.tensor(scale * value, dtype=torch.float64) for key, value in PARAMS.items()}
    groups = [{"params": [params["kernel"]]}, {"params": [params["bias"]], "weight_decay": 0.0}]
    theirs = getattr(torch.optim, kind)(groups, lr=RATE, **options, **given)
    for grads in _scaled_grads(scale):
        for key, param in params.items():
            param.grad = torch.tensor(grads[key], dtype=torch.float64)
        theirs.step()
    ours = _ours(scale, name=name, learning_rate=RATE, **given)
    _assert_same_change(ours, {key: param.numpy() for key, param in params.items()}, scale)


@pytest.mark.parametrize(
    ("name", "theirs", "numbers", "options"),
    [
        (
            "adagrad",
            "Adagrad",
            {"initial_accumulator": 0.3, "epsilon": 0.1},
            {"initial_accumulator_value": 0.3, "eps": 0.1},
        ),
        ("rmsprop", "RMSprop", {"beta2": 0.9, "epsilon": 0.1}, {"alpha": 0.9, "eps": 0.1}),
        ("adam", "Adam", {"beta2": 0.9, "epsilon": 0.1}, {"betas": (0.9, 0.9), "eps": 0.1}),
        ("adamw", "AdamW", {"beta2": 0.9, "epsilon": 0.1}, {"betas": (0.9, 0.9), "eps": 0.1, "weight_decay": 0.0}),
    ],
)
def test_the_remaining_numbers_are_pytorchs(name, theirs, numbers, options):
    torch = pytest.importorskip("torch")
    params = {key: torch.tensor(value) for key, value in PARAMS.items()}
    optimizer = getattr(torch.optim, theirs)(params.values(), lr=RATE, **options)
    for grads in GRADS:
        for key, param in params.items():
            param.grad = torch.tensor(grads[key])
        optimizer.step()
    ours = _ours(1.0, name=name, learning_rate=RATE, weight_decay=0.0, **numbers)
    _assert_same_change(ours, {key: param.numpy() for key, param in params.items()}, 1.0)


@pytest.mark.parametrize("name", ["momentum", "nesterov"])
def test_the_schedule_is_outside_the_momentum_as_in_pytorch(name):
    """With the rate within the momentum, as in Keras, old gradients would keep the rate of their own step."""
    torch = pytest.importorskip("torch")
    kind, options = TORCH[name]
    params = {key: torch.tensor(value) for key, value in PARAMS.items()}
    theirs = getattr(torch.optim, kind)(params.values(), lr=RATE, **options)
    for step, grads in enumerate(GRADS):
        theirs.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        for key, param in params.items():
            param.grad = torch.tensor(grads[key])
        theirs.step()
    ours = _ours(1.0, name=name, learning_rate=RATE, schedule="linear")
    _assert_same_change(ours, {key: param.numpy() for key, param in params.items()}, 1.0)


def test_muon_orthogonalizes_kernels_of_any_rank():
    """Jordan 2024: a kernel's update, as a matrix, has singular values near 1. Biases use Nesterov's Adam."""
    params = {"kernel": np.zeros((3, 3, 8, 16)), "bias": np.zeros(16)}
    grads = {name: RNG.standard_normal(p.shape) for name, p in params.items()}
    after = _train(_made(name="muon", learning_rate=0.5, momentum=0.0), params, [grads])
    singular = np.linalg.svd(np.reshape(after["kernel"], (72, 16)), compute_uv=False) / 0.5
    assert (singular > 0.6).all()
    assert (singular < 1.3).all()
    first = 0.9 * 0.1 / (1 - 0.9**2) + 1  # Dozat 2016, algorithm 1, at the first step: a multiple of the sign
    np.testing.assert_allclose(after["bias"], -0.05 * first * np.sign(grads["bias"]), rtol=1e-4)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_layerwise_rules_equal_their_equations(name, weight_decay):
    ours = _ours(1.0, name=name, learning_rate=RATE, momentum=MOMENTUM, weight_decay=weight_decay)
    params = {key: value.copy() for key, value in PARAMS.items()}
    memory = dict.fromkeys(params)
    for t, grads in enumerate(GRADS, start=1):
        for key, g in grads.items():
            decay = weight_decay * params[key] if key == "kernel" else 0.0
            size = np.linalg.norm(params[key])
            if name == "lars":  # You et al. 2017, equation 6: the rate is within the momentum
                update = g + decay
                local = size / np.linalg.norm(update) if key == "kernel" else 1.0
                update, memory[key] = momentum(0.001 * local * update, memory[key], t)
            else:  # You et al. 2020, algorithm 2
                m, nu = memory[key] or (0, 0)
                memory[key] = m, nu = MOMENTUM * m + (1 - MOMENTUM) * g, 0.999 * nu + 0.001 * g**2
                update = (m / (1 - MOMENTUM**t)) / (np.sqrt(nu / (1 - 0.999**t)) + 1e-6) + decay
                update = size / np.linalg.norm(update) * update
            params[key] -= RATE * update
    _assert_same_change(ours, params, 1.0)
