"""How often a crash or damage did harm: the tests under tests/reliability, with every point tried.

python tests/benchmarks/reliability.py

Prints tries and faults of each area and writes `runs/bench/reliability.json`. It takes long: each try runs a stage
twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from reasonrec.tokenizers.artefact import write_json

TESTS = Path(__file__).parents[1] / "reliability"


def main() -> None:
    """Run, count, print."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "REASONREC_RELIABILITY": "large", "REASONREC_RELIABILITY_OUT": folder}
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", str(TESTS)], env=environment, check=False)
        log = Path(folder, "tries.jsonl")
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    print(f"\n{'area':<44}{'tries':>8}{'faults':>8}")
    for line in lines:
        print(f"{line['area']:<44}{line['tries']:>8}{len(line['faults']):>8}")
    out = Path("runs/bench/reliability.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"areas": lines, "status": done.returncode})
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
