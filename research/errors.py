"""Errors that a user can act on, and every exit code of every command.

| code | meaning |
| --- | --- |
| 0 | done; also where nobody reads the output any more (`| head -1`): the record is finished in silence |
| 1 | a defect: a traceback, please report it |
| 2 | bad input: a flag, a data set, a folder; nothing was started |
| 3 | the loss or the gradient became NaN or infinite |
| 4 | the record could not be written or read (disk full, read-only, out of reach): the last good checkpoint is intact |
| 5 | out of memory: a smaller microbatch may do |
| 6 | replicas of an array differ between devices: the last good checkpoint is intact |
| 129 | the terminal was closed (SIGHUP); while training, a checkpoint was saved |
| 130 | interrupted (SIGINT); while training, a checkpoint was saved |
| 143 | terminated (SIGTERM); while training, a checkpoint was saved |

143 too where `launch.tpu up` lost too many TPUs, or one of several processes met a damaged checkpoint, which it set
aside: the same command goes on.
"""


class UserError(Exception):
    """Bad input. Its text is one line that says what was wrong and what to do; no traceback is shown."""

    exit_code = 2


class NonFiniteLossError(UserError):
    """The loss, the gradient or a parameter became NaN or infinite at `step` (0: of several runs); the text says so."""

    exit_code = 3

    def __init__(self, text: str, step: int = 0):
        super().__init__(text)
        self.step = step


class RecordError(UserError):
    """A part of the record could not be written or read; the text names it. The last good checkpoint is intact."""

    exit_code = 4


class OutOfMemoryError(UserError):
    """A device or the host had no memory left; the text names what to lower."""

    exit_code = 5


class ReplicaError(UserError):
    """Devices that should hold the same array do not; the text names both. The last good checkpoint is intact."""

    exit_code = 6


_NO_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory allocating")  # XLA:CPU calls the second INTERNAL
_LESS = (
    "lower --config.microbatch_size, a divisor of --config.batch_size: how many examples are there at once (and make "
    "one batch norm's statistics), or --config.batch_size itself"
)


def of_memory(error: BaseException, advice: str = _LESS) -> OutOfMemoryError | None:
    """What to say of an error that means that there was no memory; None: it means something else."""
    text = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not any(words in text for words in _NO_MEMORY):
        return None
    return OutOfMemoryError(f"out of memory ({text[:150] or 'of the host'}): {advice}")
