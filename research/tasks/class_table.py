"""classes.csv: the accuracy of each class, and the class that it is most often mistaken for."""

import csv
import io
from collections.abc import Sequence

import numpy as np


def make(labels: np.ndarray, predictions: np.ndarray, in_top5: np.ndarray | None, names: Sequence[str]) -> str:
    """Returns the table as CSV, with a row for each class; fields without examples or mistakes are empty.

    Args:
      labels, predictions: int [n].
      in_top5: bool [n], whether the label is among the five most likely classes; None: without this column.
      names: of the classes.
    """
    count = len(names)
    totals = np.bincount(labels, minlength=count)
    columns = {"accuracy": predictions == labels} | ({} if in_top5 is None else {"top5_accuracy": in_top5})
    means = [np.bincount(labels, hit, minlength=count) / np.maximum(totals, 1) for hit in columns.values()]
    wrong = labels != predictions
    # Only the pairs that occur: the matrix of 20,000 classes would take 3 GB.
    pairs, mistakes = np.unique(labels[wrong].astype(np.int64) * count + predictions[wrong], return_counts=True)
    order = np.argsort(mistakes, kind="stable")  # the most frequent of a class is the last that is put into the dict
    most = {int(pair) // count: (names[int(pair) % count], int(n)) for pair, n in zip(pairs[order], mistakes[order])}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "examples", *columns, "most_confused_with", "mistakes"])
    for label, name in enumerate(names):
        shown = [round(float(mean[label]), 6) if totals[label] else "" for mean in means]
        writer.writerow([name, totals[label], *shown, *most.get(label, ("", ""))])
    return text.getvalue()
