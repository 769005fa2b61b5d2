from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from reasonrec.tokenizers.environment import SPINS, expand_home, wait_passively
from reasonrec.tokenizers.errors import UserError


def test_the_home_folder_is_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home("~", "x") == str(tmp_path)
    assert expand_home("~/a/~b", "x") == f"{tmp_path}/a/~b"
    for other in ("", "a", "/a/~", "package:NAME", "Qwen/Qwen3-0.6B", "./~", "a~", "~ a"):
        assert expand_home(other, "x") == other


@pytest.mark.parametrize("path", ["~nobody-here", "~nobody-here/data"])
def test_an_unknown_user(path: str) -> None:
    with pytest.raises(
        UserError, match=f"^dataset={path}: there is no user 'nobody-here' here; write the whole path$"
    ):
        expand_home(path, "dataset")


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "")
    with pytest.raises(UserError, match=r"^dataset=~/data: HOME is not set; write"):
        expand_home("~/data", "dataset")


def test_the_policy_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    for given, expected in (((None, None), ("PASSIVE", SPINS)), ((None, "5"), ("PASSIVE", "5"))):
        for name, value in zip(policy, given, strict=True):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        wait_passively()
        assert tuple(map(os.environ.get, policy)) == expected
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    wait_passively()
    assert tuple(map(os.environ.get, policy)) == ("ACTIVE", None)


HELD = """
import sys
from pathlib import Path
from reasonrec.tokenizers.environment import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "keep":
    keep_freed_memory()
before = resident()
block = b"x" * (1 << 26 | len(sys.argv))
assert resident() - before > 6e7
del block
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library gives memory back at once")
def test_freed_memory_is_kept_unless_the_user_has_a_say() -> None:
    def held(how: str, **environment: str) -> int:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        command = [sys.executable, "-c", HELD, how]
        done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert held("leave") < 6e6
    assert held("keep") > 6e7
    assert held("keep", MALLOC_ARENA_MAX="8") < 6e6


def test_make_waits_as_the_stages_do() -> None:
    assert f"export GOMP_SPINCOUNT ?= {SPINS}\n" in (Path(__file__).parents[2] / "Makefile").read_text()
