"""What a stage lets libraries print: warnings on one line, bars on a terminal only, no advice to programmers."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from reasonrec.tokenizers.environment import keep_freed_memory, wait_passively
from reasonrec.tokenizers.errors import MAX_MESSAGE_CHARS
from reasonrec.tokenizers.terminal import say, visible

# Loggers that tell every user about something that only developers of other packages can mend.
_CHATTY = ("bitsandbytes.backends.cpu.ops",)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Set the process up for a stage; called before PyTorch is imported.

    Python users who call the library themselves keep Python's warnings. What the user asks for by the environment
    (`PYTHONWARNINGS`, `OMP_WAIT_POLICY`, `TOKENIZERS_PARALLELISM` …) stays.
    """
    wait_passively()
    keep_freed_memory()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns when a data loader forks
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What a training logs is to be seen in a file while it runs; a terminal of few characters is no reason to end.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if not sys.stderr.isatty():  # a bar that is redrawn into a file is a line of kilobytes
        for library in ("HF_HUB", "HF_DATASETS"):  # transformers follows the former
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")  # what transformers unpacks a GGUF file under follows nothing else
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", category)
            warnings.showwarning = _one_line
        yield


def _one_line(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {visible(' '.join(str(message).split()), MAX_MESSAGE_CHARS)}", file=sys.stderr)
