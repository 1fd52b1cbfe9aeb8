"""Runs an artifact that `launch.export` wrote, with nothing of `research` imported.

python -m launch.predict --artifact=DIR image.png ...                  a classifier: the likeliest classes of each image
python -m launch.predict --artifact=DIR --prompt="ROMEO:"              a language model: a text that goes on from there
python -m launch.predict --artifact=DIR --out=DIR image.png ...        an autoencoder: what it makes of each image
python -m launch.predict --artifact=DIR --out=DIR --num_samples=16     and images that it draws

--runtime=iree compiles the same programs with IREE and runs them outside JAX. Answers go to stdout, and the speed to
stderr: that of the network alone, compiling and reading files apart. Every file of the artifact is checked first.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from launch.artifacts import artifact as artifact_lib
from launch.artifacts import image_files, signatures
from launch.artifacts.artifact import Artifact, ArtifactError

if TYPE_CHECKING:
    from launch.artifacts.runtimes import Runtime

_AT_ONCE = 64  # examples; on a CPU, 256 halve the speed of the paper's CNN
_SHOWN = 3  # classes


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ArtifactError(f"{message}; --help lists the options")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; one that is not given is None, so that one that does not apply can be refused.

    Raises:
      ArtifactError: there is no such option, or a value is impossible.
      SystemExit: after `--help`.
    """
    parser = _Parser("launch.predict", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.allow_abbrev = False
    parser.add_argument("images", nargs="*", help="PNG, JPEG, BMP or WebP files of the network's size")
    parser.add_argument("--artifact", required=True, type=Path, help="folder that launch.export wrote")
    parser.add_argument("--runtime", default="jax", choices=("jax", "iree"), help="what compiles and runs it")
    parser.add_argument("--out", type=Path, help="folder of the images made, a new one or empty")
    parser.add_argument("--prompt", help="text that is gone on from (default: a new line)")
    parser.add_argument("--length", type=_number(int, 1), help="characters after the prompt (default: 500)")
    parser.add_argument("--num_samples", type=_number(int, 1), help="texts (default: 1) or images")
    parser.add_argument("--temperature", type=_number(float, 0), help="divides the logits (default: 0.8); 0: likeliest")
    parser.add_argument("--top_p", type=_number(float, 0, 1), help="as of `experiments.char_rnn` (default: 1)")
    parser.add_argument("--sample_seed", type=_number(int, 0, 2**32 - 1), help="seed of the draws (default: 0)")
    return parser.parse_args(argv)


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
    """Does what the arguments say; prints the answers.

    Raises:
      ArtifactError: bad input, found before anything is compiled or written.
    """
    options = parse(argv)
    artifact = artifact_lib.read(options.artifact)
    functions = artifact.manifest["functions"].keys()
    for needed, applies, answer in _KINDS:
        if needed <= functions:
            _refuse_others(options, applies, ", ".join(sorted(functions)))
            try:
                signatures.check(artifact.manifest, needed)
            except ValueError as error:
                raise ArtifactError(
                    f"--artifact={options.artifact} is not put together right: {error}; export it again"
                ) from None
            return answer(artifact, options)
    raise ArtifactError(
        f"--artifact={options.artifact} has {', '.join(functions)}, which launch.predict has no use for: call it from "
        "Python, by launch.artifacts.runtimes"
    )


def _refuse_others(options: argparse.Namespace, applies: Sequence[str], functions: str) -> None:
    for name, value in vars(options).items():
        if name not in ("artifact", "runtime", *applies) and value not in (None, []):
            shown = "images" if name == "images" else f"--{name}"
            raise ArtifactError(f"{shown}: of no use to this artifact, which has {functions}; leave them out")


def _runtime(artifact: Artifact, options: argparse.Namespace) -> "Runtime":
    # Imported here, as jax takes a while, so that bad input is answered at once.
    from launch.artifacts.runtimes import RUNTIMES

    return RUNTIMES[options.runtime](artifact)


def _in_batches(runtime: "Runtime", function: str, inputs: dict[str, np.ndarray], unit: str) -> dict[str, np.ndarray]:
    """The outputs for any number of examples, and their speed on stderr; scalar inputs are every batch's."""
    count = max(len(x) for x in inputs.values() if x.ndim)
    size = min(_AT_ONCE, count)
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
    print(f"{what} {unit}, {speed} ({runtime.name}; compiling apart: {compiled:.2f} s)", file=sys.stderr)


def _classify(artifact: Artifact, options: argparse.Namespace) -> None:
    if not options.images:
        raise ArtifactError("give images to classify, as in `python -m launch.predict --artifact=DIR image.png`")
    shape = artifact.manifest["functions"]["classify"]["inputs"]["image"]["shape"][1:]
    images = image_files.read(options.images, shape)
    classes = artifact.manifest["classes"]
    logits = _in_batches(_runtime(artifact, options), "classify", {"image": images}, "images")["logits"]
    for path, row in zip(options.images, _softmax(logits)):
        likeliest = np.argsort(-row, kind="stable")[:_SHOWN]
        shown = os.fsencode(path).decode(errors="replace")  # a name may be any bytes
        print(f"{shown}  " + "  ".join(f"{classes[i]} {row[i]:.3f}" for i in likeliest))


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Float64, over the last axis."""
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _reconstruct_or_draw(artifact: Artifact, options: argparse.Namespace) -> None:
    if bool(options.images) == bool(options.num_samples):
        raise ArtifactError("give either images to reconstruct, or --num_samples of images to draw")
    if options.images and options.sample_seed is not None:
        raise ArtifactError("--sample_seed is for --num_samples: reconstructions draw nothing; leave it out")
    if not options.out:
        raise ArtifactError("--out=DIR must say where the images go")
    artifact_lib.check_free(options.out)
    if options.images:
        shape = artifact.manifest["functions"]["encode"]["inputs"]["image"]["shape"][1:]
        inputs = {"image": image_files.read(options.images, shape), "index": _index(len(options.images))}
        _make_folder(options.out)
        runtime = _runtime(artifact, options)
        latents = _in_batches(runtime, "encode", inputs, "images")["mean"]
        made = _in_batches(runtime, "decode", {"latents": latents}, "images")["image"]
        names = [f"{i:04}-{Path(path).stem}.png" for i, path in enumerate(options.images)]
    else:
        inputs = {"seed": np.array(options.sample_seed or 0, np.uint32), "index": _index(options.num_samples)}
        _make_folder(options.out)
        made = _in_batches(_runtime(artifact, options), "sample", inputs, "images")["image"]
        names = [f"{i:04}.png" for i in range(len(made))]
    try:
        for name, image in zip(names, made):
            image_files.write(options.out / name, image)
            print(options.out / name)
    except OSError as error:
        raise ArtifactError(f"--out={options.out} could not be written: {error.strerror}") from None


def _make_folder(out: Path) -> None:
    """Before the network runs, so that one that cannot be made costs nothing."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"--out={out} could not be made: {error.strerror}; give another folder") from None


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
    """The number of each byte of the prompt, UTF-8, among the classes."""
    numbers = {ord(name): number for number, name in enumerate(classes)}
    for character in prompt:
        if not numbers.keys() >= set(character.encode("utf-8", "surrogateescape")):
            raise ArtifactError(f"--prompt: the network has never seen the character {character!r}: leave it out")
    return [numbers[byte] for byte in prompt.encode("utf-8", "surrogateescape")]


def draw(logits: np.ndarray, rng: np.random.Generator, temperature: float, top_p: float) -> np.ndarray:
    """Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751, section 3.1), on the host.

    Args:
      logits: float [n, characters].
      rng: draws one number a row.
      temperature: divides the logits, before `top_p` looks at them; 0 takes the likeliest character.
      top_p: the draw is from the fewest likeliest characters whose probabilities sum to this or more.

    Returns:
      int32 [n].
    """
    if temperature == 0:
        return logits.argmax(-1).astype(np.int32)
    order = np.argsort(-logits, axis=-1, kind="stable")
    probabilities = _softmax(np.take_along_axis(logits, order, -1) / temperature)
    sums = np.cumsum(probabilities, -1)
    outside = sums - probabilities >= top_p
    outside[:, 0] = False  # the likeliest stays, whatever top_p is
    sums = np.cumsum(np.where(outside, 0, probabilities), -1)
    rank = (sums <= rng.random((len(logits), 1)) * sums[:, -1:]).sum(-1)
    return np.take_along_axis(order, rank[:, None], -1)[:, 0].astype(np.int32)


_KINDS: list[tuple[set[str], tuple[str, ...], Callable[[Artifact, argparse.Namespace], None]]] = [
    ({"classify"}, ("images",), _classify),
    ({"encode", "decode", "sample"}, ("images", "out", "num_samples", "sample_seed"), _reconstruct_or_draw),
    ({"step"}, ("prompt", "length", "num_samples", "temperature", "top_p", "sample_seed"), _continue_text),
]


def main(argv: Sequence[str] | None = None) -> None:
    """The whole command: says in one line what was wrong, and exits with 2 then."""
    try:
        run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads the answers any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except ArtifactError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
