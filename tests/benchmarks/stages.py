"""Stages as processes of a benchmark: each runs once, so that an interrupted benchmark goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"


def run_stage(script: str, config: str, out: Path, **options: Any) -> None:
    """Run a stage, unless what it writes is there.

    Args:
        script: Name of the script in `recipes/`.
        config: Its configuration in `recipes/configs/`, such as `demo/sft`.
        out: Folder that it writes.
        **options: Its other flags.

    Raises:
        CalledProcessError: If it fails.
    """
    if (out / "manifest.json").exists():
        return
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, f"recipes/{script}.py", "--config", str(CONFIGS / f"{config}.yaml")]
    subprocess.run([*command, "--output_dir", str(out), *words], check=True, cwd=ROOT)
