"""Runs an artifact written by `launch.export`; from `research` it imports only the image decoder.

python -m launch.predict --artifact=DIR image.png folder ...           classifier: the most likely classes of each image
python -m launch.predict --artifact=DIR --prompt="ROMEO:"              language model: a continuation of the prompt
python -m launch.predict --artifact=DIR --out=DIR image.png ...        autoencoder: reconstructions of the images
python -m launch.predict --artifact=DIR --out=DIR --num_samples=16     autoencoder: sampled images

--runtime=iree compiles the same programs with IREE and runs them outside JAX. Predictions go to stdout, the speed to
stderr (of the network alone, without compilation and reading files). All files of the artifact are checked first.
"""

import argparse
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from launch.artifacts import artifact as artifact_lib
from launch.artifacts import expected_signatures, image_files
from launch.artifacts.artifact import Artifact, ArtifactError

if TYPE_CHECKING:
    from launch.artifacts.runtimes import Runtime

_BATCH_SIZE = 64  # on a CPU, 256 halves the speed of the tutorial CNN
_NUM_SHOWN = 3  # classes


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ArtifactError(f"{message}; --help lists the options")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the options. Those that were not given are None, so that options that do not apply can be rejected.

    Raises:
      ArtifactError: an option is unknown, or a value is invalid.
      SystemExit: after `--help`.
    """
    parser = _Parser("launch.predict", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.allow_abbrev = False
    images_help = "image files or folders of them, of the network's input size unless it was trained on crops"
    parser.add_argument("images", nargs="*", help=images_help)
    parser.add_argument("--artifact", required=True, type=_path, help="folder written by launch.export")
    parser.add_argument("--runtime", default="jax", choices=("jax", "iree"), help="compiles and runs the programs")
    parser.add_argument("--out", type=_path, help="folder for the output images, new or empty")
    parser.add_argument("--prompt", help="text to continue (default: a newline)")
    parser.add_argument("--length", type=_number(int, 1), help="number of characters to generate (default: 500)")
    parser.add_argument("--num_samples", type=_number(int, 1), help="number of texts (default: 1) or images")
    parser.add_argument("--temperature", type=_number(float, 0), help="divides the logits (default: 0.8); 0: greedy")
    parser.add_argument(
        "--top_p", type=_number(float, 0, 1), help="nucleus sampling, as in `experiments.char_rnn` (default: 1)"
    )
    parser.add_argument("--sample_seed", type=_number(int, 0, 2**32 - 1), help="random seed (default: 0)")
    return parser.parse_args(argv)


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def _number(kind: Any, least: float, most: float = float("inf")) -> Callable[[str], Any]:
    def parsed(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most or value == float("inf"):
            bounds = f"{least} or more" if most == float("inf") else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {bounds}")
        return value

    return parsed


def run(argv: Sequence[str]) -> None:
    """Runs the artifact and prints its predictions.

    Raises:
      ArtifactError: bad input, found before anything is compiled or written.
    """
    options = parse(argv)
    artifact = artifact_lib.read(options.artifact)
    functions = artifact.manifest["functions"].keys()
    for needed, applies, predict in _KINDS:
        if needed <= functions:
            _refuse_others(options, applies, ", ".join(sorted(functions)))
            try:
                expected_signatures.check(artifact.manifest, needed)
            except ValueError as error:
                raise ArtifactError(
                    f"--artifact={options.artifact} is inconsistent: {error}; export it again"
                ) from None
            return predict(artifact, options)
    raise ArtifactError(
        f"--artifact={options.artifact} has the functions {', '.join(functions)}, which launch.predict does not "
        "support: call them from Python with launch.artifacts.runtimes"
    )


def _refuse_others(options: argparse.Namespace, applies: Sequence[str], functions: str) -> None:
    for name, value in vars(options).items():
        if name not in ("artifact", "runtime", *applies) and value not in (None, []):
            shown = "images" if name == "images" else f"--{name}"
            raise ArtifactError(
                f"{shown} does not apply to this artifact, whose functions are {functions}; leave it out"
            )


def _runtime(artifact: Artifact, options: argparse.Namespace) -> "Runtime":
    # Imported late, since importing jax takes seconds: bad input is reported before.
    from launch.artifacts.runtimes import RUNTIMES

    return RUNTIMES[options.runtime](artifact)


def _in_batches(runtime: "Runtime", function: str, inputs: dict[str, np.ndarray], unit: str) -> dict[str, np.ndarray]:
    """Runs a function batch by batch, and reports its speed on stderr; scalar inputs are passed to every batch."""
    count = max(len(x) for x in inputs.values() if x.ndim)
    size = min(_BATCH_SIZE, count)
    parts, began = [], time.monotonic()
    before = runtime.compile_seconds
    for start in range(0, count, size):
        index = np.minimum(np.arange(start, start + size), count - 1)
        parts.append(runtime(function, {name: x[index] if x.ndim else x for name, x in inputs.items()}))
    compiled = runtime.compile_seconds - before
    _report(runtime, f"{function}: {count:,}", unit, count, time.monotonic() - began - compiled, compiled)
    return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}


def _report(runtime: "Runtime", what: str, unit: str, count: int, seconds: float, compiled: float) -> None:
    speed = f"{count / seconds:,.0f} {unit}/s"
    print(f"{what} {unit}, {speed} ({runtime.name}; compilation excluded: {compiled:.2f} s)", file=sys.stderr)


def _classify(artifact: Artifact, options: argparse.Namespace) -> None:
    if not options.images:
        raise ArtifactError("give images to classify, as in `python -m launch.predict --artifact=DIR image.png`")
    shape = artifact.manifest["functions"]["classify"]["inputs"]["image"]["shape"][1:]
    paths = image_files.list_files(options.images)
    images = image_files.read(paths, shape, artifact.manifest.get("center_crop"))
    classes = artifact.manifest["classes"]
    logits = _in_batches(_runtime(artifact, options), "classify", {"image": images}, "images")["logits"]
    for path, row in zip(paths, _softmax(logits)):
        likeliest = np.argsort(-row, kind="stable")[:_NUM_SHOWN]
        shown = os.fsencode(path).decode(errors="replace")  # a file name may not be UTF-8
        print(f"{shown}  " + "  ".join(f"{classes[i]} {row[i]:.3f}" for i in likeliest))


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Float64, over the last axis."""
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _reconstruct_or_draw(artifact: Artifact, options: argparse.Namespace) -> None:
    if bool(options.images) == bool(options.num_samples):
        raise ArtifactError("give either images to reconstruct, or --num_samples=N to sample images")
    if options.images and options.sample_seed is not None:
        raise ArtifactError("--sample_seed is for --num_samples: reconstruction is deterministic; leave it out")
    if not options.out:
        raise ArtifactError("give --out=DIR, the folder for the images")
    artifact_lib.check_free(options.out)
    if options.images:
        shape = artifact.manifest["functions"]["encode"]["inputs"]["image"]["shape"][1:]
        paths = image_files.list_files(options.images)
        inputs = {
            "image": image_files.read(paths, shape, artifact.manifest.get("center_crop")),
            "index": _index(len(paths)),
        }
        _make_folder(options.out)
        runtime = _runtime(artifact, options)
        latents = _in_batches(runtime, "encode", inputs, "images")["mean"]
        decoded = _in_batches(runtime, "decode", {"latents": latents}, "images")["image"]
        names = [f"{i:04}-{Path(path).stem}.png" for i, path in enumerate(paths)]
    else:
        inputs = {"seed": np.array(options.sample_seed or 0, np.uint32), "index": _index(options.num_samples)}
        _make_folder(options.out)
        decoded = _in_batches(_runtime(artifact, options), "sample", inputs, "images")["image"]
        names = [f"{i:04}.png" for i in range(len(decoded))]
    try:
        for name, image in zip(names, decoded):
            image_files.write(options.out / name, image)
            print(options.out / name)
    except OSError as error:
        raise ArtifactError(f"--out={options.out} could not be written: {error.strerror}") from None


def _make_folder(out: Path) -> None:
    """Creates the folder, before the network runs."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"--out={out} cannot be created: {error.strerror}; give another folder") from None


def _index(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32)


def _continue_text(artifact: Artifact, options: argparse.Namespace) -> None:
    classes = artifact.manifest["classes"]
    prompt = _tokens(options.prompt or "\n", classes)
    count, length = options.num_samples or 1, options.length or 500
    temperature = 0.8 if options.temperature is None else options.temperature
    top_p = 1.0 if options.top_p is None else options.top_p
    rng = np.random.default_rng(options.sample_seed or 0)
    runtime = _runtime(artifact, options)
    inputs = artifact.manifest["functions"]["step"]["inputs"]
    memory = {name: np.zeros((count, *x["shape"][1:]), x["dtype"]) for name, x in inputs.items() if name != "token"}
    texts, began = [np.full(count, token, np.int32) for token in prompt], time.monotonic()
    for number in range(len(prompt) + length - 1):
        outputs = runtime("step", {"token": texts[number], **memory})
        memory = {name: outputs[name] for name in memory}
        if number >= len(prompt) - 1:
            texts.append(draw(outputs["logits"], rng, temperature, top_p))
    seconds = time.monotonic() - began - runtime.compile_seconds
    steps = count * (len(prompt) + length - 1)
    _report(runtime, f"step: {steps:,}", "characters", steps, seconds, runtime.compile_seconds)
    for number, row in enumerate(np.stack(texts, 1)):
        print(f"--- sample {number + 1} of {count}")
        print(bytes(ord(classes[token]) for token in row).decode(errors="replace"))


def _tokens(prompt: str, classes: Sequence[str]) -> list[int]:
    """The token of each byte of the prompt, in UTF-8."""
    numbers = {ord(name): number for number, name in enumerate(classes)}
    for character in prompt:
        if not numbers.keys() >= set(character.encode("utf-8", "surrogateescape")):
            raise ArtifactError(f"--prompt: the network was not trained on the character {character!r}: leave it out")
    return [numbers[byte] for byte in prompt.encode("utf-8", "surrogateescape")]


def draw(logits: np.ndarray, rng: np.random.Generator, temperature: float, top_p: float) -> np.ndarray:
    """Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751, section 3.1), on the host.

    Args:
      logits: float [n, characters].
      rng: draws one number per row.
      temperature: divides the logits, before `top_p` is applied; 0 is greedy decoding.
      top_p: samples from the smallest set of most likely characters whose probabilities sum to this or more.

    Returns:
      int32 [n].
    """
    if temperature == 0:
        return logits.argmax(-1).astype(np.int32)
    order = np.argsort(-logits, axis=-1, kind="stable")
    probabilities = _softmax(np.take_along_axis(logits, order, -1) / temperature)
    sums = np.cumsum(probabilities, -1)
    outside = sums - probabilities >= top_p
    outside[:, 0] = False  # the most likely one stays, even if top_p is 0
    sums = np.cumsum(np.where(outside, 0, probabilities), -1)
    rank = (sums <= rng.random((len(logits), 1)) * sums[:, -1:]).sum(-1)
    return np.take_along_axis(order, rank[:, None], -1)[:, 0].astype(np.int32)


_KINDS: list[tuple[set[str], tuple[str, ...], Callable[[Artifact, argparse.Namespace], None]]] = [
    ({"classify"}, ("images",), _classify),
    ({"encode", "decode", "sample"}, ("images", "out", "num_samples", "sample_seed"), _reconstruct_or_draw),
    ({"step"}, ("prompt", "length", "num_samples", "temperature", "top_p", "sample_seed"), _continue_text),
]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. After bad input it prints one line and exits with code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # class names may have characters that stdout cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:  # stdout was closed, as by `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except ArtifactError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
