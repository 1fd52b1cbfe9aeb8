"""Errors that a user can act on, and every exit code of every command.

| code | meaning |
| --- | --- |
| 0 | done; also where nobody reads the output any more (`| head -1`): the record is finished in silence |
| 1 | a defect: a traceback, please report it |
| 2 | bad input: a flag, a data set, a folder; nothing was started |
| 3 | the loss became NaN or infinite |
| 4 | the record could not be written (disk full, read-only, out of reach): the last good checkpoint is intact |
| 130 | interrupted (SIGINT); while training, a checkpoint was saved |
| 143 | terminated (SIGTERM); while training, a checkpoint was saved |
"""

import sys
from typing import NoReturn


class UserError(Exception):
    """Bad input. Its text is one line that says what was wrong and what to do; no traceback is shown."""

    exit_code = 2


class NonFiniteLossError(UserError):
    """The training loss became NaN or infinite; the text names the step."""

    exit_code = 3


class RecordError(UserError):
    """A part of the record could not be written; the text names it. The last good checkpoint is intact."""

    exit_code = 4


def exit_with(error: UserError) -> NoReturn:
    """Ends the process with the error's one line and its exit code."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(error.exit_code)
