"""A stage that a scheduler or a person stops: what it says and what it leaves."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reasonrec.recipes import sft
from reasonrec.recipes.trainers.resume import last_checkpoint
from reasonrec.tokenizers.output import resume_folder

SFT = Path(sft.__file__)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupt_says_what_is_kept_and_what_goes_on(
    sft_flags: list[str], lora_flags: list[str], tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    """As a scheduler or a person stops it, in the middle of a training that would go on for long."""
    out = tmp_path / "lora"
    command = [sys.executable, str(SFT), *sft_flags, *lora_flags, "--output_dir", str(out)]
    more = ["--num_train_epochs", "999"]
    with subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while last_checkpoint(resume_folder(out)) is None and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(sent)
        _, printed = process.communicate()
    assert process.returncode == status, printed
    last = printed.strip().splitlines()[-1]
    assert re.match(
        rf"interrupted: {resume_folder(out)} keeps the checkpoint of step \d+; the same command goes", last
    )
    assert last.endswith(f": python {shlex.join([*command[1:], *more])}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.resume"], "no lock stays"
