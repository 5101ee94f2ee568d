"""What the user is told when something goes wrong: UserError, how it ends a script, warnings. Imports nothing heavy."""

import errno
import os
import sys

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Something the user can mend: one line naming file, line or flag and the way out. exit_code 2: wrong usage."""

    def __init__(self, message, exit_code=1):
        super().__init__(message)
        self.exit_code = exit_code


def run_main(main):
    """Run a script's main() and end the process: UserError and a full disk become one line on stderr, no traceback."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        message, code = str(error), error.exit_code
    except BrokenPipeError:  # the reader, `head` for one, has seen enough: nobody is left to tell anything
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in FULL_DISK + (errno.EACCES, errno.ENOENT, errno.EISDIR, errno.ENOTDIR):
            raise
        message, code = f"{error.filename or 'output'}: {error.strerror}", 1
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def warn(text):
    """One line on stderr, from one of the processes that a launcher started."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr, flush=True)
