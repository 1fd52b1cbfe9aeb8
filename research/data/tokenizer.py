"""Trains a tokenizer: byte-level byte-pair encoding of a text.

python -m research.data.tokenizer --name=text --data_dir=DIR --vocabulary_size=8192 --out=tokenizer.json
python -m research.data.tokenizer --name=tiny_shakespeare --vocabulary_size=1024 --out=tokenizer.json

It sees the training split only. Any text can be encoded, and is the same after decoding. Train a language model on its
tokens with --config.dataset.tokenizer=tokenizer.json. It needs Hugging Face tokenizers: pip install -e ".[text]".
"""

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags

from research.data import command_line, token_store, tokenization
from research.data.token_store import decoded, split
from research.errors import UserError

_BYTES = 256  # of every vocabulary


def define_flags() -> flags.FlagValues:
    """Defines the flags of this command."""
    values = command_line.new_flags("text", "the new file")
    flags.DEFINE_integer("vocabulary_size", 8192, "number of tokens", _BYTES + 1, 2**24, flag_values=values)
    return values


def run(argv: Sequence[str]) -> None:
    """Trains the tokenizer, writes it and prints what it is.

    Raises:
      UserError: bad input, found before training; or the file cannot be written.
    """
    given = command_line.parse(define_flags(), argv, str(__doc__), "--name=SET --out=tokenizer.json")
    if not given:
        return
    out = Path(given["out"]).expanduser()
    if out.exists():
        raise UserError(f"--out={out} exists: give another file, or remove it")
    if not os.access(out.absolute().parent, os.W_OK):
        raise UserError(f"--out={out}: no such folder, or it is read-only")
    tokenization.library()  # an error if it is missing
    start = time.monotonic()
    from research.data import named_sets  # late, since it imports jax

    with _own_flags():
        text = named_sets.open_text(given["name"], given["data_dir"])
        print(f"training {given['vocabulary_size']:,} tokens on {text.name} ...", file=sys.stderr, flush=True)
        content = train(token_store.read_blocks(text, is_utf8=True), given["vocabulary_size"], text.name)
    new = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        new.write_text(content, encoding="utf-8")
        new.rename(out)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise UserError(f"--out={out} could not be written ({error.strerror})") from None
    size = len(tokenization.FromJson(content, str(out)).names)
    print(f"{out}: {size:,} tokens, in {time.monotonic() - start:.0f} s: use --config.dataset.tokenizer={out}")


@contextlib.contextmanager
def _own_flags() -> Iterator[None]:
    """Names the flags of this command in the errors of the block, which name those of training."""
    try:
        yield
    except UserError as error:
        error.args = (re.sub(r"--config\.dataset\.(name|data_dir)\b", r"--\1", str(error)),)
        raise


def train(blocks: Iterator[bytes], vocabulary_size: int, name: str = "the text") -> str:
    """Trains byte-level byte-pair encoding, as of GPT-2 (Radford et al. 2019, section 2.2).

    The text need not fit in memory, but its different words must.

    Args:
      blocks: the text, in UTF-8.
      vocabulary_size: the number of tokens; there are fewer if no pair of tokens is left that occurs twice.
      name: of the text, in messages.

    Returns:
      The text of a `tokenizer.json`.

    Raises:
      UserError: `tokenizers` is not installed, or the text is not in UTF-8.
    """
    library = tokenization.library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator((text for piece in split(blocks) for text in decoded(name, [piece])), trainer)
    return tokenizer.to_str()


def main(argv: Sequence[str]) -> None:
    """Runs the command; an error is one line on stderr and an exit code (see `research.errors`)."""
    command_line.start(run, argv, "nothing was written")


if __name__ == "__main__":
    main(sys.argv[1:])
