"""Kills a stage at chosen file operations of its finish, runs it again, and looks at what stands.

python tests/reliability/kill_at.py <stage> <points> <output_dir> [flags of the stage]

Every file operation that Python makes raises an audit event before it happens; those that touch the output or what
lies beside it are counted from the moment its partial folder is begun. `points` is how many of them are tried, spread
evenly; 0 stands for all. Each try is a fork of this process, which has imported everything and computed nothing, so
that it takes no longer than the stage itself. Prints JSON: operations, tries, and what went wrong.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

STAGES = {"prepare": "prepare", "index": "index_items", "synthesize": "synthesize", "sft": "sft", "grpo": "grpo"}
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


def forked(stage: str, out: Path, flags: list[str], at: int) -> tuple[int, int]:
    """Run a stage in a fork that dies at an operation; returns its status and how many operations it began."""
    log = out.with_name("log.txt")
    report = os.memfd_create("seen")
    if (child := os.fork()) == 0:
        status = 70
        try:
            stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            sys.argv = [f"reasonrec {stage}", *flags, "--output_dir", str(out)]
            module = importlib.import_module(f"reasonrec.recipes.{STAGES[stage]}")
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
    from reasonrec.tokenizers.errors import UserError

    stage, points, out, flags = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    for name in (*HEAVY, f"reasonrec.recipes.{STAGES[stage]}"):
        importlib.import_module(name)
    faults: list[str] = []
    status, operations = forked(stage, out, flags, NEVER)
    if status:
        print(json.dumps({"operations": 0, "tries": 1, "faults": [out.with_name("log.txt").read_text()[-2000:]]}))
        return
    expected = read_manifest(out).hash
    tries = range(1, operations + 1)
    if points and points < operations:
        tries = sorted({1 + round(i * (operations - 1) / max(points - 1, 1)) for i in range(points)})  # type: ignore[assignment]
    for at in tries:
        sweep(out)
        status, _ = forked(stage, out, flags, at)
        if status != -signal.SIGKILL:
            faults.append(f"operation {at}: the kill gave status {status}")
        try:
            if out.exists() and read_manifest(out).hash != expected:
                faults.append(f"operation {at}: another artefact stands")
        except UserError as error:
            faults.append(f"operation {at}: half an artefact stands: {error}")
        status, _ = forked(stage, out, flags, NEVER) if not out.exists() else (0, 0)
        left = sorted(path.name for path in out.parent.glob(f"{out.name}*"))
        if status:
            faults.append(f"operation {at}: the second run ended with {status}: {_last(out)}")
        elif read_manifest(out).hash != expected:
            faults.append(f"operation {at}: the second run made something else")
        elif set(left) - {out.name, f"{out.name}.lock", f"{out.name}.resume"}:
            faults.append(f"operation {at}: {left} stay")
    sweep(out)
    print(json.dumps({"operations": operations, "tries": len(tries), "faults": faults}))


def _last(out: Path) -> str:
    lines = out.with_name("log.txt").read_text().strip().splitlines()
    return lines[-1] if lines else ""


if __name__ == "__main__":
    main()
