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
from typing import Any

from reasonrec.tokenizers.artefact import write_json

TESTS = Path(__file__).parents[1] / "reliability"


def main() -> None:
    """Run, count, print."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"REASONREC_RELIABILITY": "large", "REASONREC_RELIABILITY_OUT": folder, "OMP_NUM_THREADS": "1"}
        workers = ["-n", str(os.cpu_count() or 1), "--dist", "worksteal"]
        command = [sys.executable, "-m", "pytest", "-q", *workers, str(TESTS)]
        done = subprocess.run(command, env={**os.environ, **settings}, check=False)
        log = Path(folder, "tries.jsonl")
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    areas: dict[str, dict[str, Any]] = {}
    for line in lines:  # a test that is made for many inputs reports each
        area = areas.setdefault(line["area"], {"tries": 0, "faults": []})
        area["tries"] += line["tries"]
        area["faults"] += line["faults"]
    print(f"\n{'area':<56}{'tries':>9}{'faults':>8}")
    for name, area in sorted(areas.items()):
        print(f"{name:<56}{area['tries']:>9,}{len(area['faults']):>8}")
    total = [sum(area["tries"] for area in areas.values()), sum(len(area["faults"]) for area in areas.values())]
    print(f"{'all':<56}{total[0]:>9,}{total[1]:>8}")
    out = Path("runs/bench/reliability.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"areas": areas, "status": done.returncode})
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
