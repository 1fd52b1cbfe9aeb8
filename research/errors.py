"""Errors that a user can act on, and the exit codes of all commands.

| code | meaning |
| --- | --- |
| 0 | done, even if its output was closed (`| head -1`): the command keeps running without it |
| 1 | a bug: please report the traceback |
| 2 | bad input: a flag, a data set, a folder; nothing was started |
| 3 | the loss or the gradient became NaN or infinite |
| 4 | the record could not be written or read (disk full, read-only, unreachable): the last good checkpoint is intact |
| 5 | out of memory: a smaller microbatch may fit |
| 6 | replicas of an array differ between devices: the last good checkpoint is intact |
| 129 | the terminal was closed (SIGHUP); while training, a checkpoint was saved |
| 130 | interrupted (SIGINT); while training, a checkpoint was saved |
| 143 | terminated (SIGTERM); while training, a checkpoint was saved |

143 also means that `launch.tpu up` lost too many TPUs, or that one of several processes found a damaged checkpoint and
set it aside: the same command resumes the run.
"""


class UserError(Exception):
    """Bad input. The text is one line: what is wrong and what to do about it. No traceback is shown."""

    exit_code = 2

    def _render_traceback_(self) -> list[str]:
        """Returns what IPython shows instead of a traceback, in notebooks, too."""
        return [f"{type(self).__name__}: {' '.join(str(self).split())}"]


class NonFiniteLossError(UserError):
    """The loss, the gradient or a parameter became NaN or infinite at `step` (0: in several runs at once)."""

    exit_code = 3

    def __init__(self, text: str, step: int = 0):
        super().__init__(text)
        self.step = step


class RecordError(UserError):
    """A file of the record could not be written or read; the text names it. The last good checkpoint is intact."""

    exit_code = 4


class OutOfMemoryError(UserError):
    """A device or the host ran out of memory; the text names what to lower."""

    exit_code = 5


class ReplicaError(UserError):
    """Replicas of an array differ; the text names the array and devices. The last good checkpoint is intact."""

    exit_code = 6


def brief(error: BaseException) -> str:
    """Returns the error's text on one line, at most 200 characters of it, to be quoted in a message."""
    return " ".join(str(error).split())[:200]


_OUT_OF_MEMORY_TEXTS = ("RESOURCE_EXHAUSTED", "Out of memory allocating")  # the second: XLA:CPU, with status INTERNAL
_ADVICE = (
    "lower --config.microbatch_size, a divisor of --config.batch_size: how many examples are in memory at once (and in "
    "the statistics of batch norm), or --config.batch_size itself"
)


def as_out_of_memory_error(error: BaseException, advice: str = _ADVICE) -> OutOfMemoryError | None:
    """Returns an `OutOfMemoryError` with `advice` if `error` means out of memory, else None."""
    text = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not any(words in text for words in _OUT_OF_MEMORY_TEXTS):
        return None
    return OutOfMemoryError(f"out of memory ({text[:150] or 'of the host'}): {advice}")
