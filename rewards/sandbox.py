"""A reward in a process of its own, so that checking it ends whatever its file does.

The file of a reward is somebody's code: it may loop, eat all memory, end the process or crash it, when it is imported
as when it is called. Here a child process runs it within limits and sends back numbers as JSON; what they mean is
decided by the process that asks. That is for mistakes. It is no wall against code that means harm: the child may do
what its user may.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any

import yaml

from reasonrec.rewards.calling import LARGEST, Reward
from reasonrec.rewards.check import Answer, Ended, Finding, Question, answer, check
from reasonrec.rewards.registry import load_reward
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import one_line

_LONGEST_LINE = 1 << 24  # bytes of an answer
_LONGEST_ERROR = 1000
_NO_ANSWER = "its process wrote what is no answer"


@dataclass(frozen=True)
class Limits:
    """What a reward may take, over its whole check.

    Attributes:
        seconds: Time from the import of its file to the last value.
        memory_gb: Memory of its process in GiB, where the system can limit it.

    Raises:
        UserError: If one is not above 0 and finite.
    """

    seconds: float = 120.0
    memory_gb: float = 4.0

    def __post_init__(self) -> None:
        for name, value in (("time_limit", self.seconds), ("memory_limit", self.memory_gb)):
            if not 0 < value <= LARGEST:
                raise UserError(f"--{name} {value:g} has to be above 0 and at most {LARGEST:g}")


def check_apart(spec: str, options: Mapping[str, Any], limits: Limits) -> Finding:
    """Try a reward in a process of its own.

    Args:
        spec: A registered name, or `path/to/file.py:function`.
        options: Values of the function's own keywords.
        limits: What it may take.

    Returns:
        What was found; a reward that hangs, crashes or ends its process is among the violations.

    Raises:
        UserError: If there is no such reward, or its file fails.
    """
    with _Child(limits) as child:
        try:
            child.load(spec, options)
        except Ended as error:
            return Finding(violations=[f"loading it: {error}"])
        return check(child.ask)


class _Child:
    """The process, from the side that asks."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._deadline = limits, math.inf
        self._lines: queue.Queue[bytes] = queue.Queue(2)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # so that what it starts ends with it
        )
        threading.Thread(target=self._pump, args=(self._process.stdout,), daemon=True).start()

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL) if hasattr(os, "killpg") else self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]

    def load(self, spec: str, options: Mapping[str, Any]) -> None:
        """Import the reward. The clock starts here: a slow start of Python is not the reward's.

        Raises:
            Ended: If no answer comes, or none that a child can have given.
            UserError: If there is no such reward, or its file fails.
        """
        self._receive()
        self._deadline = time.monotonic() + self._limits.seconds
        limits = asdict(self._limits)
        loaded = self._exchange({"spec": spec, "options": yaml.safe_dump(dict(options)), "limits": limits})
        error = loaded.get("error")
        if not isinstance(error, str):
            raise Ended(_NO_ANSWER)
        if error:
            raise UserError(error)

    def ask(self, question: Question) -> Answer:
        """Have a batch scored.

        Raises:
            Ended: If no answer comes, or none that a reward can have given.
        """
        found = self._exchange(asdict(question))
        values, error, seconds = found.get("values"), found.get("error"), found.get("seconds")
        good = isinstance(error, str) and isinstance(seconds, float)
        if values is not None:  # the child has checked them, but what counts is judged here
            good = good and isinstance(values, list) and len(values) == question.size
            good = good and all(v is None or (type(v) is float and abs(v) <= LARGEST) for v in values)
        if not good:
            raise Ended(_NO_ANSWER)
        return Answer(values, str(error), bool(found.get("changed")), float(seconds or 0))

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(OSError):  # it is gone: reading says how
            stream = self._process.stdin
            assert stream is not None
            stream.write(json.dumps(message).encode() + b"\n")
            stream.flush()
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self._left())
            if not line:
                raise Ended(_ending(self._process.wait(self._left())))
        except (queue.Empty, subprocess.TimeoutExpired) as error:
            raise Ended(
                f"no answer within {self._limits.seconds:g} s: it hangs, or it needs a longer --time_limit"
            ) from error
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Ended(_NO_ANSWER) from error
        if not isinstance(found, dict):
            raise Ended(_NO_ANSWER)
        return found

    def _left(self) -> float | None:
        return None if self._deadline == math.inf else max(self._deadline - time.monotonic(), 0.0)

    def _pump(self, stream: IO[bytes]) -> None:
        with stream:
            while line := stream.readline(_LONGEST_LINE):
                self._lines.put(line)
        self._lines.put(b"")


def _ending(status: int) -> str:
    if status >= 0:
        return f"it ended its process with status {status} (os._exit?)"
    with contextlib.suppress(ValueError):
        return f"its process was ended by {signal.Signals(-status).name}: it crashed, or took more than it may"
    return f"its process was ended by signal {-status}"


def _restrict(limits: Limits) -> None:
    """Keep this process within its limits, where the system has them."""
    try:
        import resource
    except ImportError:  # Windows
        return
    # Processor time is for a child whose parent is gone; all cores may be at work within the time.
    seconds = math.ceil(limits.seconds * (os.cpu_count() or 1) + time.process_time()) + 1
    memory = int(limits.memory_gb * 2**30)
    # Of the data, not of the address space: libraries map far more than they use.
    for kind, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_DATA, memory), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (most, most))


def _load(message: Mapping[str, Any]) -> tuple[Reward | None, str]:
    try:
        return load_reward(message["spec"], yaml.safe_load(message["options"])), ""
    except UserError as error:
        return None, one_line(error, _LONGEST_ERROR)
    except BaseException as error:
        return None, f"loading {message['spec']!r} failed with {one_line(type(error).__name__)}: {one_line(error)}"


def _score(reward: Reward, message: Mapping[str, Any]) -> Answer:
    rows = message["rows"]
    try:
        found = answer(reward, Question(message["mode"], None if rows is None else tuple(rows), message["speed"]))
        return Answer(found.values, one_line(found.error, _LONGEST_ERROR), found.changed, found.seconds)
    except BaseException as error:
        return Answer(None, f"it raised {one_line(type(error).__name__)}: {one_line(error)}")


def main() -> None:
    """The child: a line of JSON comes in, another goes out, until there is none."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):  # a reward may print, and read
        os.dup2(nothing, stream)

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message).encode() + b"\n")
        answers.flush()

    send({"ready": True})
    first = json.loads(questions.readline())
    _restrict(Limits(**first["limits"]))
    reward, error = _load(first)
    send({"error": error})
    if reward is not None:
        for line in questions:
            send(asdict(_score(reward, json.loads(line))))


if __name__ == "__main__":
    main()
