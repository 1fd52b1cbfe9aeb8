"""Reads and decodes every image of a data set, and lists the damaged ones.

python -m research.data.check folder --data_dir=DIR

The exit code is 0 if all are intact, and 2 if some are damaged, the set cannot be opened, or an argument is invalid.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import NoReturn

from tqdm import tqdm

from research.data import sources
from research.data.example_reader import ExampleReader
from research.data.source import DamagedError
from research.data.streamed import reader_pool
from research.dataset_config import DatasetConfig
from research.errors import UserError

_AT_ONCE = 1024  # records, between updates of the progress bar


def find_damage(reader: ExampleReader, number: int) -> str:
    """Returns what is wrong with an example; empty if it is intact."""
    try:
        reader.read(number)
    except DamagedError as error:
        return str(error)
    return ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: give NAME [--data_dir=DIR]; --help lists the options")


def run(argv: Sequence[str]) -> int:
    """Checks the data set that the command line names; returns the number of damaged examples.

    Raises:
      UserError: an argument is invalid, the set cannot be opened, or it has no images.
    """
    parser = _Parser("research.data.check", description=str(__doc__).partition("\n")[0])
    parser.add_argument("name", help="of the data set, as in --config.dataset.name")
    parser.add_argument("--data_dir", default="", help="its folder, as in --config.dataset.data_dir")
    options = parser.parse_args(argv)
    label_names, splits = sources.open_records(options.name, options.data_dir)
    num_damaged = num_examples = 0
    for split, source in splits.items():
        num_examples += len(source)
        reader = ExampleReader(split, source, DatasetConfig(name=options.name, image_size=1), len(label_names))
        with tqdm(total=len(source), desc=split, unit="image", disable=None) as bar:
            for start in range(0, len(source), _AT_ONCE):
                numbers = range(start, min(start + _AT_ONCE, len(source)))
                found = reader_pool().map(functools.partial(find_damage, reader), numbers)
                for number, problem in zip(numbers, found):
                    if problem:
                        num_damaged += 1
                        tqdm.write(f"{reader.name(number)} {problem}", file=sys.stdout)
                bar.update(len(numbers))
    print(f"{options.name}: {num_damaged:,} of {num_examples:,} examples are damaged")
    return num_damaged


if __name__ == "__main__":
    try:
        sys.exit(2 if run(sys.argv[1:]) else 0)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
