"""Reads and decodes every image of a data set, and lists the damaged ones.

python -m research.data.check folder --data_dir=DIR

The exit code is 0 if all are intact, and 2 if some are damaged or the data set cannot be opened.
"""

import argparse
import functools
import sys
from collections.abc import Sequence

from tqdm import tqdm

from research.data import decoding, sources
from research.data.source import DamagedError, Source
from research.data.streamed import reader_pool
from research.errors import UserError

_AT_ONCE = 1024  # records, between updates of the progress bar


def find_damage(source: Source, num_classes: int, number: int) -> str:
    """Returns what is wrong with a record; empty if it is intact.

    Args:
      source: of the record.
      num_classes: labels must be below it; 0: any.
      number: of the record.
    """
    try:
        record = source[number]
        if isinstance(record["image"], bytes):
            decoding.decode(record["image"], source.channels)
    except (DamagedError, decoding.ImageError) as error:
        return str(error)
    label = int(record.get("label", -1))
    if num_classes and not -1 <= label < num_classes:
        return f"has the label {label}, which is not in 0..{num_classes - 1}"
    return ""


def run(argv: Sequence[str]) -> int:
    """Checks the data set that the command line names; returns the number of damaged examples.

    Raises:
      UserError: it cannot be opened, or has no images.
    """
    parser = argparse.ArgumentParser("research.data.check", description=str(__doc__).partition("\n")[0])
    parser.add_argument("name", help="of the data set, as in --config.dataset.name")
    parser.add_argument("--data_dir", default="", help="its folder, as in --config.dataset.data_dir")
    options = parser.parse_args(argv)
    label_names, splits = sources.open_records(options.name, options.data_dir)
    num_damaged = num_examples = 0
    for split, source in splits.items():
        num_examples += len(source)
        with tqdm(total=len(source), desc=split, unit="image", disable=None) as bar:
            for start in range(0, len(source), _AT_ONCE):
                numbers = range(start, min(start + _AT_ONCE, len(source)))
                found = reader_pool().map(functools.partial(find_damage, source, len(label_names)), numbers)
                for number, problem in zip(numbers, found):
                    if problem:
                        num_damaged += 1
                        tqdm.write(f"{split}, {source.record_name(number)} {problem}", file=sys.stdout)
                bar.update(len(numbers))
    print(f"{options.name}: {num_damaged:,} of {num_examples:,} examples are damaged")
    return num_damaged


if __name__ == "__main__":
    try:
        sys.exit(2 if run(sys.argv[1:]) else 0)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
