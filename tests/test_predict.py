"""`launch.predict`: answers without `research`, and one clear line for whatever is wrong with what it is given."""

import hashlib
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from artifacts import SHAPE, color_images, save_image, write, write_classifier
from flax import nnx
from PIL import Image

from experiments import char_rnn
from launch import predict
from launch.artifacts import artifact, batches, sampling, tokens
from launch.artifacts.artifact import ArtifactError
from research.config import RNNConfig
from research.data.tokenization import Bytes
from research.models import rnn
from research.tasks.generation import generate
from research.tasks.language_model import LanguageModel
from research.tasks.task import ExportedFunction

CHARACTERS = "\nabcdefg"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("classifier") / "a")


@pytest.fixture(scope="module")
def model():
    return rnn.RNN(RNNConfig(name="gru", width=8, layers=1), len(CHARACTERS), nnx.Rngs(0))


@pytest.fixture(scope="module")
def language_model(model, tmp_path_factory):
    config = char_rnn.gru()
    config.model = RNNConfig(name="gru", width=8, layers=1)
    task = LanguageModel(lambda _: model, lambda size: rnn.initial_carry(config.model, size), 8)
    functions = {
        name: ExportedFunction(lambda _, inputs, f=f: f.call(model, inputs), f.inputs, f.preprocessing)
        for name, f in task.functions(model, None).items()  # pyright: ignore[reportArgumentType]
    }
    return write(tmp_path_factory.mktemp("rnn") / "a", CHARACTERS, functions)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """Its latent is the mean; a sample is as bright as its seed and number say."""

    def encode(_, inputs):
        return {"mean": inputs["image"].astype("float32").mean((1, 2, 3))[:, None] / 255 + 0 * inputs["index"][:, None]}

    def decode(_, inputs):
        gray = inputs["latents"][:, :, None, None]
        return {"image": jax.numpy.broadcast_to(gray, (gray.shape[0], 4, 6, 1))}

    def sample(_, inputs):
        gray = (inputs["seed"].astype("float32") + inputs["index"]) / 255
        return {"image": jax.numpy.broadcast_to(gray[:, None, None, None], (*gray.shape, 4, 6, 1))}

    functions = {
        "encode": ExportedFunction(encode, {"image": ("b, 4, 6, 1", "uint8"), "index": ("b", "int32")}, ""),
        "decode": ExportedFunction(decode, {"latents": ("b, 1", "float32")}, ""),
        "sample": ExportedFunction(sample, {"seed": ("", "uint32"), "index": ("b", "int32")}, ""),
    }
    return write(tmp_path_factory.mktemp("vae") / "a", (), functions)


def test_nothing_of_research_is_imported_but_the_decoder(classifier, tmp_path, env):
    code = (
        "import sys; sys.modules |= dict.fromkeys(('experiments', 'flax', 'optax', 'tensorflow_datasets')); "
        "from launch import predict; predict.main(sys.argv[1:]); "
        "print(*(name for name in sys.modules if name.startswith('research.')), file=sys.stderr)"
    )
    args = [sys.executable, "-c", code, f"--artifact={classifier}", *color_images(tmp_path)]
    done = subprocess.run(args, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[1].split(" ")[0] for line in done.stdout.splitlines()] == ["red", "green", "blue"]
    assert "3 images" in done.stderr
    imported = done.stderr.splitlines()[-1].split()
    assert set(imported) == {
        "research.data",
        "research.data.decoding",
        "research.process",
        "research.process.allocator",
        "research.process.child",
        "research.process.xla_flags",
    }


@pytest.mark.parametrize("count", [1, batches.BATCH_SIZE + 1])
def test_classes_and_their_probabilities(classifier, tmp_path, capsys, count):
    paths = color_images(tmp_path, count)
    predict.run([f"--artifact={classifier}", *paths])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == count
    high, low = np.exp(24 * 180 * 2e-4), np.exp(24 * 80 * 2e-4)
    for i, line in enumerate(lines):
        path, first, second, _ = line.split("  ")
        assert (path, first) == (paths[i], f"{('red', 'green', 'blue')[i % 3]} {high / (high + 2 * low):.3f}")
        assert second.endswith(f" {low / (high + 2 * low):.3f}")


def test_a_folder_of_images_is_classified(classifier, tmp_path, capsys):
    paths = color_images(tmp_path)
    (tmp_path / "labels.txt").touch()
    predict.run([f"--artifact={classifier}", str(tmp_path)])
    output = capsys.readouterr()
    lines = [line.split("  ") for line in output.out.splitlines()]
    assert [(path, first.split(" ")[0]) for path, first, *_ in lines] == list(zip(paths, ("red", "green", "blue")))
    assert f"not an image file (1): {tmp_path / 'labels.txt'}\n" in output.err


def test_one_odd_image_of_several_ends_it_before_anything_is_said(classifier, tmp_path, capsys):
    (tmp_path / "odd.png").write_text("no image")
    with pytest.raises(SystemExit) as exit_:
        predict.main([f"--artifact={classifier}", *color_images(tmp_path), str(tmp_path / "odd.png")])
    output = capsys.readouterr()
    assert (exit_.value.code, output.out) == (2, "")
    (line,) = output.err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'odd.png'} is not an intact image")


def test_a_platform_without_devices_is_named(classifier, tmp_path, capsys, monkeypatch):
    def raises():
        raise AssertionError  # as JAX does without the platform's plugin

    monkeypatch.setattr(jax, "default_backend", raises)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(SystemExit) as exit_:
        predict.main([f"--artifact={classifier}", *color_images(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2
    assert line.startswith("error: JAX_PLATFORMS=cuda: jax finds no such device (its plugin is not installed)")


@pytest.mark.slow
def test_a_text_goes_on_as_the_network_would(language_model, model, capsys):
    args = [f"--artifact={language_model}", "--prompt=abc", "--length=12"]
    predict.run([*args, "--temperature=0"])
    text = capsys.readouterr().out.partition("\n")[2].removesuffix("\n")
    carry = rnn.initial_carry(RNNConfig(name="gru", width=8, layers=1), 1)
    options = {"length": 12, "temperature": 0, "top_p": 1.0}
    expected = generate(model, np.array([[1, 2, 3]]), carry, jax.random.key(0), **options)
    assert text == "abc" + "".join(CHARACTERS[i] for i in np.asarray(expected)[0])

    def drawn(*more):
        predict.run([*args, "--temperature=1", "--num_samples=2", *more])
        return capsys.readouterr().out

    assert drawn() == drawn("--sample_seed=0") != drawn("--sample_seed=1")
    assert drawn().count("--- sample") == 2
    assert drawn("--top_p=0.01") == drawn("--top_p=0.01", "--sample_seed=1")  # the likeliest, whatever is drawn
    predict.run([f"--artifact={language_model}"])
    assert len(capsys.readouterr().out.removesuffix("\n").split("\n", 1)[1]) == 501  # from a new line


def test_draws_follow_their_probabilities():
    logits = np.log(np.tile([0.5, 0.1, 0.3, 0.1], (20000, 1)))
    for temperature, top_p, expected in (
        (1.0, 1.0, [0.5, 0.1, 0.3, 0.1]),
        (1.0, 0.7, [0.625, 0, 0.375, 0]),
        (0.5, 1.0, [25 / 36, 1 / 36, 9 / 36, 1 / 36]),
        (0.0, 1.0, [1, 0, 0, 0]),
    ):
        drawn = sampling.draw(logits, np.random.default_rng(0), temperature, top_p)
        np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20000, expected, atol=0.015)


def test_an_autoencoder_writes_what_it_makes(autoencoder, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    source = save_image(tmp_path / "in" / "x.png", np.uint8([[0] * 6, [50] * 6, [100] * 6, [250] * 6]))
    predict.run([f"--artifact={autoencoder}", f"--out={tmp_path / 'o'}", source, str(tmp_path / "in")])
    printed = capsys.readouterr().out.splitlines()
    assert printed == [str(tmp_path / "o" / f"000{i}-x.png") for i in range(2)]
    np.testing.assert_array_equal(np.asarray(Image.open(printed[1])), np.full((4, 6), 100))
    predict.run([f"--artifact={autoencoder}", f"--out={tmp_path / 's'}", "--num_samples=3", "--sample_seed=7"])
    grays = [int(np.asarray(Image.open(path))[0, 0]) for path in capsys.readouterr().out.splitlines()]
    assert grays == [7, 8, 9]


def _changed(classifier, folder, change):
    """A copy whose manifest is changed, with the checksum of the new text."""
    shutil.copytree(classifier, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest, folder)
    manifest["sha256"] = artifact._checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _no_program(manifest, folder):
    data = b"no program"
    (folder / "classify.jaxexport").write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"]["classify.jaxexport"] = entry


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda m, _: m["files"]["weights.safetensors"].update(sha256="0"),
            "weights.safetensors does not match its checksum",
        ),
        (
            lambda m, _: m.update(functions={"f": m["functions"]["classify"]}),
            "has the functions f, which launch.predict does not support",
        ),
        (lambda m, _: m.update(platforms=["tpu"]), "is for tpu, but jax runs on cpu here"),
        (_no_program, "programs cannot be read by jax"),
    ],
)
def test_an_artifact_that_is_not_right_gets_one_line(classifier, tmp_path, capsys, change, words):
    _changed(classifier, tmp_path / "a", change)
    with pytest.raises(SystemExit) as exit_:
        predict.main([f"--artifact={tmp_path / 'a'}", *color_images(tmp_path, 1)])
    output = capsys.readouterr()
    assert (exit_.value.code, output.out) == (2, "")
    (line,) = output.err.splitlines()
    assert line.startswith("error: ")
    assert words in line


@pytest.mark.parametrize(
    ("kind", "args", "words"),
    [
        ("classifier", [], "give images to classify"),
        ("classifier", ["--prompt=a"], "--prompt does not apply to this artifact, whose functions are classify"),
        ("classifier", ["--runtme=jax"], "unrecognized arguments: --runtme=jax"),
        ("classifier", ["--runtime=tvm"], "invalid choice: 'tvm'"),
        ("classifier", ["--top=4", "x.png"], "--top=4: the network has 3 classes; give at most this number"),
        ("classifier", ["--top=0", "x.png"], "'0' is not a number of 1 or more"),
        ("classifier", ["--csv=file", "x.png"], "--csv=file exists: give a new file, or remove it"),
        ("classifier", ["--csv=file/t.csv", "x.png"], "--csv=file/t.csv cannot be written: Not a directory"),
        ("classifier", ["--csv=none/t.csv", "x.png"], "--csv=none/t.csv cannot be written: No such file or directory"),
        ("classifier", ["nosuch.png"], "nosuch.png: no such file"),
        ("language_model", ["--top=1"], "--top does not apply to this artifact"),
        ("autoencoder", ["--csv=t.csv", "x.png"], "--csv does not apply to this artifact"),
        ("classifier", ["--num_samples=0"], "'0' is not a number of 1 or more"),
        ("language_model", ["x.png"], "images does not apply to this artifact, whose functions are step"),
        ("language_model", ["--prompt=aZ"], "was not trained on the character 'Z'"),
        ("language_model", ["--prompt=a\udce9"], r"was not trained on the character '\udce9'"),
        ("language_model", ["--top_p=2"], "'2' is not a number of 0 to 1"),
        ("language_model", ["--temperature=nan"], "'nan' is not a number of 0 or more"),
        ("language_model", ["--length=x"], "'x' is not a number of 1 or more"),
        ("autoencoder", ["--out=o"], "give either images to reconstruct, or --num_samples"),
        ("autoencoder", ["--num_samples=2"], "give --out=DIR"),
        ("autoencoder", ["--out=o", "--sample_seed=1", "x.png"], "--sample_seed is for --num_samples"),
        ("autoencoder", ["--out=.", "--num_samples=2"], "--out=. exists and is not an empty folder"),
        ("autoencoder", ["--out=file/o", "--num_samples=2"], "--out=file/o cannot be created: Not a directory"),
    ],
)
def test_options_that_do_not_apply_are_refused(request, tmp_path, monkeypatch, kind, args, words):
    """Before the network is compiled."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "_runtime", None)
    (tmp_path / "file").touch()
    save_image(tmp_path / "x.png", np.zeros(SHAPE, np.uint8))
    with pytest.raises(ArtifactError) as error:
        predict.run([f"--artifact={request.getfixturevalue(kind)}", *args])
    assert words in str(error.value)


def test_a_prompt_may_be_bytes_that_the_network_knows():
    assert tokens.encode({"classes": ["a", "\xc3"]}, "a\udcc3") == [0, 1]
    np.testing.assert_array_equal(Bytes(("a", "\xc3")).encode("a\udcc3"), [0, 1])
