"""Processes that start in a moment: forks of an interpreter that has imported all that is slow.

Importing torch and what torch.export needs takes some seven seconds of a core, a fork takes none. The
interpreter does nothing but import: a test's own process has autograd's threads, which no fork has. Each
interpreter hashes strings with a seed of its own, as the processes of a real run do.
"""

from __future__ import annotations

import atexit
import functools
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Client, Connection, Listener
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]


class Interpreter:
    """Runs functions, each in a process of its own, as long as the pipe to it is open."""

    def __init__(self, pipe: Connection, pid: int) -> None:
        self._pipe = pipe
        self._pid = pid

    def start(self, function: Callable[..., object], *args: object) -> Running:
        """Call a function of a module in a new process, which ends when the function does."""
        ours, theirs = Pipe()
        self._pipe.send((sys.path, pickle.dumps((function, args))))
        send_handle(self._pipe, theirs.fileno(), self._pid)
        theirs.close()
        return Running(ours, ours.recv())


@dataclass(frozen=True)
class Running:
    """A process that an interpreter has started."""

    pipe: Connection
    pid: int

    def code(self, seconds: float = 180) -> int:
        """How it ended: 0, what `exit` was given, or minus a signal's number. Kill one that hangs."""
        if not self.pipe.poll(seconds):
            os.kill(self.pid, signal.SIGKILL)
        return int(self.pipe.recv())


@functools.cache
def interpreter(number: int = 0) -> Interpreter:
    """One of those that the tests share: as many as are to hash strings in their own way."""
    ours, theirs = Pipe()
    code = (
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "import helpers.imports\n"
        "from multiprocessing.connection import Connection\n"
        f"from helpers.processes import serve; serve(Connection({theirs.fileno()}))"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},  # the other check cannot be forked
    )
    theirs.close()

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return Interpreter(ours, server.pid)


@contextmanager
def interpreter_with(imports: str) -> Iterator[Interpreter]:
    """One more, that has run these import statements as well."""
    with Listener(family="AF_UNIX") as listener:
        running = interpreter().start(_serve_with, imports, listener.address)
        pipe = listener.accept()
    try:
        yield Interpreter(pipe, running.pid)
    finally:
        pipe.close()
        running.code()


def _serve_with(imports: str, address: str) -> None:
    pipe = Client(address)
    exec(imports, {})
    serve(pipe)


def serve(requests: Connection) -> None:
    """The interpreter's own life: a fork a function, until nobody asks any more."""
    while True:
        try:
            path, job = requests.recv()
        except EOFError:
            return
        answers: Connection = Connection(recv_handle(requests))
        if os.fork() == 0:  # one that waits, so that this one need not
            requests.close()
            child = os.fork()
            if child == 0:
                answers.close()
                sys.path[:] = path
                function, args = pickle.loads(job)
                function(*args)
                return  # to the interpreter's end, as a script comes to it
            answers.send(child)
            answers.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            os._exit(0)
        answers.close()
        while _forget_one():
            pass


def _forget_one() -> bool:
    """Whether one of those that wait had ended."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


# -- scripts --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """How a script ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def run_script(
    folder: Path,
    *words: str,
    environment: dict[str, str] | None = None,
    by: Interpreter | None = None,
) -> Done:
    """`python script.py WORDS` in a folder, but for the time to import torch."""
    code = (by or interpreter()).start(as_main, folder, words, environment or {}).code(300)
    return Done(code, (folder / "stdout").read_text(), (folder / "stderr").read_text())


def as_main(folder: Path, words: Sequence[str], environment: dict[str, str]) -> None:
    """Be the process that runs folder/script.py."""
    os.environ.update(environment)
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    main: Any = sys.modules["__main__"]
    main.__file__ = str(folder / "script.py")
    sys.argv = ["script.py", *words]
    sys.path.insert(0, str(folder))
    exec(compile(Path("script.py").read_text(), "script.py", "exec"), vars(main))
