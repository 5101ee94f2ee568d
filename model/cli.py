"""What the command lines share: flags and the one way an error reaches the user. Imports nothing heavy."""

import errno
import sys


class UserError(Exception):
    """Something the user can mend: one line naming file, line or flag and the way out. exit_code 2 means wrong usage."""

    def __init__(self, message, exit_code=1):
        super().__init__(message)
        self.exit_code = exit_code


def run_main(main):
    """Run a script's main() and end the process: UserError and a full disk become one line on stderr, never a traceback."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        message, code = str(error), error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.ENOENT, errno.EISDIR, errno.ENOTDIR):
            raise
        message, code = f"{error.filename or 'output'}: {error.strerror}", 1
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
