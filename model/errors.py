"""What the user is told when something goes wrong: UserError, how it ends a script, warnings. Imports nothing heavy."""

import errno
import os
import shlex
import sys
from pathlib import Path

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SCRIPTS = Path(__file__).resolve().parent.parent


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


def say(text, stream=None, write=print):
    """One line on `stream` (default: stdout). When its reader is gone, as after `| head` or a closed terminal, the work
    goes on in silence."""
    stream = stream or sys.stdout
    try:
        write(text, file=stream)
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def tell(text):
    """One line on stderr, from one of the processes that a launcher started."""
    if os.environ.get("RANK", "0") == "0":
        say(text, sys.stderr)


def warn(text):
    """tell, as a warning."""
    tell(f"warning: {text}")


def command_line(*extra, without=()):
    """This run's command as typed, for "to go on: ..." messages: flags in `extra` appended unless there, the flags of
    `without` left out, {flag: how many words its value is} (also under a shortened name, which argparse takes when it
    is unique). Outside the scripts, in a notebook for one, the calls that do the same."""
    if Path(sys.argv[0]).suffix != ".py" or Path(sys.argv[0]).resolve().parent != SCRIPTS:
        first = "a Trainer without stop_after, " if "--stop_after" in without else ""
        return f"{first}Trainer.resume(), then Trainer.train()"
    words, rest = [], iter(sys.argv)
    for word in rest:
        name, equals, _ = word.partition("=")
        left_out = next((flag for flag in without if len(name) > 2 and flag.startswith(name)), None)
        if left_out is None:
            words.append(word)
        elif not equals:
            for _ in range(without[left_out]):
                next(rest, None)
    ranks = os.environ.get("WORLD_SIZE", "1")
    launcher = ["python"] if ranks == "1" else ["torchrun", "--nproc_per_node", ranks]
    return shlex.join([*launcher, *words, *(flag for flag in extra if flag not in words)])
