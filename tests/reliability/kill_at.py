"""Kills a stage at chosen file operations of its finish, and at random moments, and runs it again.

python tests/reliability/kill_at.py <stage> <points> <moments> <output_dir> [flags of the stage]

Every file operation that Python makes raises an audit event before it happens; those that touch the output or what
lies beside it are counted from the moment its partial folder is begun. `points` is how many of them are tried, spread
evenly; 0 stands for all. `moments` is how many more kills come at random in the time that the stage takes. Each try is
a fork of this process, which has imported everything and computed nothing, so that it takes no longer than the stage
itself. Prints JSON: operations, tries, and what went wrong.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

# Imported before the forks; none of them computes on import.
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "sklearn.cluster", "tqdm")
WRITES = {
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.chmod",
    "os.truncate",
    "shutil.rmtree",
    "shutil.copytree",
}
NEVER = 1 << 60


class Counter:
    """Counts file operations on an output once its partial folder is begun, and kills the process at one of them."""

    def __init__(self, out: Path, at: int, report: int) -> None:
        self.out, self.partial, self.at, self.report = str(out), f"{out}.partial", at, report
        self.seen = 0

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        """An audit hook."""
        if not arguments or (event not in WRITES and event != "open"):
            return
        path, mode = arguments[0], arguments[1] if len(arguments) > 1 else None
        if isinstance(path, int) or not str(path).startswith(self.out):
            return
        if event == "open" and isinstance(mode, str) and not set(mode) & set("wax+"):
            return  # reading changes nothing
        if not self.seen and not str(path).startswith(self.partial):
            return
        self.seen += 1
        os.pwrite(self.report, self.seen.to_bytes(8, "little"), 0)
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def forked(stage: str, out: Path, flags: list[str], at: int = NEVER, after: float | None = None) -> tuple[int, int]:
    """Run a stage in a fork that dies at an operation, or after so many seconds.

    Returns:
        Its status, and how many operations it began.
    """
    log = out.with_name("log.txt")
    report = os.memfd_create("seen")
    if (child := os.fork()) == 0:
        status = 70
        try:
            stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            sys.argv = [f"reasonrec {stage}", *flags, "--output_dir", str(out)]
            module = importlib.import_module(f"reasonrec.recipes.{stage}")
            from reasonrec.recipes.args import run

            sys.addaudithook(Counter(out, at, report))
            run(module.main)()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if after is not None:
        end = time.monotonic() + after
        over = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while time.monotonic() < end and os.waitid(os.P_PID, child, over) is None:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)  # one that has ended is still there until it is waited for
    _, code = os.waitpid(child, 0)
    seen = int.from_bytes(os.pread(report, 8, 0), "little")
    os.close(report)
    return os.waitstatus_to_exitcode(code), seen


def sweep(out: Path) -> None:
    """Remove an output and all that lies beside it."""
    for path in out.parent.glob(f"{out.name}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def main() -> None:
    """Run the tries."""
    from reasonrec.tokenizers.artefact import read_manifest

    stage, points, moments, out, flags = (
        sys.argv[1],
        int(sys.argv[2]),
        int(sys.argv[3]),
        Path(sys.argv[4]),
        sys.argv[5:],
    )
    for name in (*HEAVY, f"reasonrec.recipes.{stage}"):
        importlib.import_module(name)
    began = time.monotonic()
    status, operations = forked(stage, out, flags)
    took = time.monotonic() - began
    if status:
        raise SystemExit(out.with_name("log.txt").read_text()[-2000:])
    expected = read_manifest(out).hash
    chosen: Iterable[int] = range(1, operations + 1)
    if points and points < operations:
        chosen = sorted({1 + round(i * (operations - 1) / max(points - 1, 1)) for i in range(points)})
    finish = [fault for at in chosen for fault in attempt(stage, out, flags, expected, at=at)]
    drawn = [random.Random(number).uniform(0, took) for number in range(moments)]
    elsewhere = [fault for after in drawn for fault in attempt(stage, out, flags, expected, after=after)]
    sweep(out)
    found = {
        "operations": operations,
        "kills in the finish": {"tries": len(list(chosen)), "faults": finish},
        "kills at random moments": {"tries": moments, "faults": elsewhere},
    }
    print(json.dumps(found))


def attempt(
    stage: str, out: Path, flags: list[str], expected: str, *, at: int = NEVER, after: float | None = None
) -> list[str]:
    """Kill a run once, run it again, and say what is wrong with what stands."""
    from reasonrec.tokenizers.artefact import read_manifest
    from reasonrec.tokenizers.errors import UserError

    where, faults = f"operation {at}" if after is None else f"after {after:.3f} s", []
    sweep(out)
    status, _ = forked(stage, out, flags, at, after)
    if status != -signal.SIGKILL and (after is None or status):  # by then it may have been done
        faults.append(f"{where}: the kill gave status {status}: {_last(out)}")
    try:
        if out.exists() and read_manifest(out).hash != expected:
            faults.append(f"{where}: another artefact stands")
    except UserError as error:
        faults.append(f"{where}: half an artefact stands: {error}")
    status, _ = forked(stage, out, flags) if not out.exists() else (0, 0)
    left = sorted(path.name for path in out.parent.glob(f"{out.name}*"))
    if status:
        faults.append(f"{where}: the second run ended with {status}: {_last(out)}")
    elif read_manifest(out).hash != expected:
        faults.append(f"{where}: the second run made something else")
    elif set(left) - {out.name, f"{out.name}.lock", f"{out.name}.resume"}:
        faults.append(f"{where}: {left} stay")
    return faults


def _last(out: Path) -> str:
    lines = out.with_name("log.txt").read_text().strip().splitlines()
    return lines[-1] if lines else ""


if __name__ == "__main__":
    main()
