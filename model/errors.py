"""What the user is told when something goes wrong: UserError, how it ends a script, warnings. Imports nothing heavy."""

import atexit
import contextlib
import errno
import io
import os
import re
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SCRIPTS = Path(__file__).resolve().parent.parent
OTHERS_END_WITHIN = 2  # seconds in which a launcher other than torchrun ends the processes beside one that failed


class UserError(Exception):
    """Something the user can mend: one line naming file, line or flag and the way out. exit_code 2: wrong usage. An empty
    message: another process tells."""

    def __init__(self, message, exit_code=1):
        super().__init__(message)
        self.exit_code = exit_code


def run_main(main):
    """Run a script's main() and end the process; what a user can cause is one line on stderr (see describe)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell's >&-: the next file opened must not take its place
            setattr(sys, name, open(os.devnull, "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an ASCII or GBK terminal; Python does as much for stderr
    try:
        try:
            code = main() or 0
        except SystemExit as end:  # argparse: --help, wrong usage
            code = end.code
        sys.stdout.flush()
    except BaseException as error:
        line, code = describe(error)
        if line is None:
            first_to_fail()  # what the others meet follows from this
            raise
        finish_stdout()
        if line and not isinstance(error, BrokenPipeError):  # the reader, `head` for one, has seen enough
            tell_error(line)
    sys.exit(code)


def tell_error(line):
    """The one line on stderr about what ended the run; of processes that train together, that of the first to fail."""
    if first_to_fail():
        with contextlib.suppress(OSError):
            print(f"error: {line}", file=sys.stderr)


def first_to_fail():
    """Whether no other process that a launcher started beside this one has failed before: where all meet the same error, or
    lose the one that met it, one of them tells."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(OTHERS_END_WITHIN)
        return True
    try:  # torchrun gives each process a folder of its own in one of the whole launch
        (Path(error_file).parents[1] / "failed").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass  # a full disk: better told twice than never
    return True


def describe(error):
    """(the line for the user, exit code) of an exception; the line is None for a bug, which needs its traceback."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if interrupted(error):
        return "interrupted", 130
    if isinstance(error, OSError) and error.errno is not None:
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{names}: {error.strerror}" if names else error.strerror, 1
    if lost_process(error):
        problem = "another process of this run has ended; its own error stands above, or in its machine's output"
        way_on = command_line("--resume", without={"--overwrite": 0})
        return f"{problem}; what was saved last is intact, to go on from there: {way_on}", 1
    if is_out_of_memory(error):
        return "out of memory; end other programs, or choose a smaller model, batch or context", 1
    if isinstance(error, ModuleNotFoundError) and (package := requirement(error.name)):
        return f"{package} is not installed: source .venv/bin/activate, or make quickstart first", 1
    return None, 1


def is_out_of_memory(error):
    """Whether the exception `error` says that memory ran out: Python's, a GPU's (torch's class, which is not imported
    here) or torch's on the CPU, for which it has no class."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return "DefaultCPUAllocator" in str(error) or "can't allocate memory" in str(error)


def lost_process(error):
    """Whether `error` is how torch.distributed tells that another process is gone (its classes are not imported here; gloo
    has none)."""
    return type(error).__name__ in ("DistBackendError", "DistNetworkError") or "gloo/transport" in str(error)


def interrupted(error):
    """Whether Ctrl-C is what led to `error`: compiled code, torch as it writes a file for one, turns a
    KeyboardInterrupt into errors of its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def requirement(module):
    """The line of requirements.txt, without its version, that would install `module`; None if there is none."""
    packages = re.findall(r"^[\w.]+", (SCRIPTS / "requirements.txt").read_text("utf-8"), re.MULTILINE)
    return next((package for package in packages if f"{package}.".startswith(f"{module}.")), None)


def finish_stdout():
    """Write what is left for stdout, or let it go where that cannot be: it would fail again as Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        let_go(sys.stdout)


def let_go(stream):
    """Send what is still written to `stream` nowhere."""
    with contextlib.suppress(OSError, AttributeError):  # a notebook's, for one, is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def leave_early(kind, error, trace):
    """sys.excepthook of a script: one line also for what happens before its main() runs, a missing package for one, and
    for a second Ctrl-C as it leaves."""
    line, code = describe(error)
    if line is None:
        return sys.__excepthook__(kind, error, trace)
    tell_error(line)
    sys.exit(code)


def ignore_interrupt(event):
    """sys.unraisablehook of a script: Ctrl-C while Python is ending is no traceback."""
    if not issubclass(event.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(event)


def interrupt(number, frame):
    """SIGINT handler of a script. While a module is being imported, which takes seconds, it leaves at once: there is
    nothing to lose yet, and the compiled ones turn a KeyboardInterrupt into errors of their own or swallow it."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            if "--multiprocessing-fork" not in sys.orig_argv:  # a worker process is silent, its parent tells
                os.write(2, b"error: interrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def running_script():
    """Path of the repository's script that this process runs; None in a notebook or another program."""
    path = Path(sys.argv[0]).resolve()
    return path if path.suffix == ".py" and SCRIPTS in (path.parent, path.parent.parent) else None


if running_script():
    sys.excepthook, sys.unraisablehook = leave_early, ignore_interrupt
    own = threading.current_thread() is threading.main_thread()  # not the page's, which Streamlit runs in others
    if own and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as with the shell's &
        signal.signal(signal.SIGINT, interrupt)
        # Python ends with the system's handler, which would kill a script that has told its exit code; what was
        # registered first runs last.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def say(text, stream=None, write=print):
    """One line on `stream` (default: stdout). When its reader is gone, as after `| head` or a closed terminal, the work
    goes on in silence."""
    stream = stream or sys.stdout
    try:
        write(text, file=stream)
        stream.flush()
    except OSError:
        let_go(stream)


def tell(text):
    """One line on stderr, from one of the processes that a launcher started. A terminal that is gone ends nothing."""
    if os.environ.get("RANK", "0") == "0":
        say(text, sys.stderr)


def warn(text):
    """tell, as a warning."""
    tell(f"warning: {text}")


def command_line(*extra, without=()):
    """This run's command as typed, for "to go on: ..." messages: flags in `extra` appended unless there, the flags of
    `without` left out, {flag: how many words its value is} (also under a shortened name, which argparse takes when it
    is unique). Outside the scripts, in a notebook for one, the calls that do the same."""
    if getattr(running_script(), "parent", None) != SCRIPTS:
        first = "a Trainer without stop_after, " if "--stop_after" in without else ""
        return f"{first}Trainer.resume(), then Trainer.train()"
    words, rest, without = [], iter(sys.argv), {"--local_rank": 1, **dict(without)}  # which a launcher adds itself
    for word in rest:
        name, equals, _ = word.partition("=")
        left_out = next((flag for flag in without if len(name) > 2 and flag.startswith(name)), None)
        if left_out is None:
            words.append(word)
        elif not equals:
            for _ in range(without[left_out]):
                next(rest, None)
    return shlex.join([*launcher(), *words, *(flag for flag in extra if flag not in words)])


def launcher():
    """The words before the script's name that start this run again: those for one of several machines end with "...", for
    where they meet is not known here."""
    ranks, here = (os.environ.get(name) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if ranks in (None, "1"):
        return ["python"]
    machines = [] if here in (None, ranks) else ["--nnodes", os.environ.get("GROUP_WORLD_SIZE", "2"), "..."]
    return ["torchrun", "--nproc_per_node", here or ranks, *machines]
