from __future__ import annotations

import enum
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from reasonrec.recipes.args import parse, read_yaml, run
from reasonrec.tokenizers.errors import UserError


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Part:
    dataset: str
    rate: float = 1e-3
    steps: int = field(default=10, metadata={"help": "how long to train"})
    name: str | None = None
    limit: int | None = 5
    keep: bool = False
    shuffle: bool = True
    sizes: list[int] = field(default_factory=lambda: [64, 64])
    paths: list[str] = field(default_factory=list)
    tasks: dict[str, float] = field(default_factory=lambda: {"seqrec": 1.0})
    method: Literal["full", "lora"] = "lora"
    colour: Colour = Colour.RED
    pair: str | list[str] = "none"


@dataclass
class Other:
    seed: int = 0
    window: int = 3

    def __post_init__(self) -> None:
        if self.window == 13:
            raise ValueError("window=13 brings bad luck; take 12")
        if self.window == 14:
            raise UserError("window=14 is 13 in disguise; take 12")


Write = Callable[[str], str]


@pytest.fixture
def config(tmp_path: Path) -> Write:
    """Writes a configuration and returns its path."""

    def write(text: str) -> str:
        (tmp_path / "stage.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "stage.yaml")

    return write


def both(*argv: str) -> tuple[Part, Other]:
    part, other = parse([Part, Other], list(argv))
    return part, other


def test_defaults_and_the_order_of_the_classes() -> None:
    part, other = both("--dataset", "d")
    assert part == Part("d")
    assert other == Other()
    assert parse([Other, Part], ["--dataset=d"]) == (Other(), Part("d"))
    assert both("--dataset", "d")[0].tasks is not part.tasks, "defaults are not shared"


def test_flags_override_the_file_and_the_file_the_defaults(config: Write) -> None:
    path = config("dataset: file\nsteps: 20\nrate: 0.5\nwindow: 4\nshuffle: false\nsizes: [1, 2, 3]\n")
    part, other = both("--steps", "30", "--config", path, "--window=5")
    assert (part.dataset, part.steps, part.rate, part.shuffle, part.sizes) == ("file", 30, 0.5, False, [1, 2, 3])
    assert (other.window, other.seed) == (5, 0)
    assert both(f"--config={path}")[0].steps == 20
    # A flag that says what the default is still overrides the file.
    assert both("--config", path, "--steps", "10", "--shuffle", "true")[0].steps == 10
    assert both("--config", path, "--steps", "10", "--shuffle", "true")[0].shuffle is True


@pytest.mark.parametrize(
    ("argv", "keep", "shuffle"),
    [
        ([], False, True), (["--keep"], True, True), (["--keep", "false"], False, True),
        (["--keep=true"], True, True), (["--no_shuffle"], False, False), (["--no-shuffle"], False, False),
        (["--shuffle", "no"], False, False), (["--keep", "1", "--shuffle", "0"], True, False),
    ],
)  # fmt: skip
def test_booleans_on_the_command_line(argv: list[str], keep: bool, shuffle: bool) -> None:
    part, _ = both("--dataset", "d", *argv)
    assert (part.keep, part.shuffle) == (keep, shuffle)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("yes", True), ("off", False)])
def test_booleans_in_the_file(config: Write, text: str, value: bool) -> None:
    assert both("--config", config(f"dataset: d\nkeep: {text}\n"))[0].keep is value


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("rate: 1e-3", "rate", 1e-3),  # YAML 1.1 reads it as text
        ("rate: 1.0e-3", "rate", 1e-3), ("rate: 2", "rate", 2), ("rate: '0.5'", "rate", 0.5),
        ("steps: '7'", "steps", 7), ("name: null", "name", None), ("name:", "name", None), ("name: x", "name", "x"),
        ("limit: null", "limit", None), ("limit: 0", "limit", 0), ("sizes: []", "sizes", []),
        ("sizes: [3]", "sizes", [3]), ("paths: [a, b]", "paths", ["a", "b"]),
        ("tasks: {seqrec: 1, item2index: 2e-1}", "tasks", {"seqrec": 1, "item2index": 0.2}),
        ("tasks: {}", "tasks", {}), ("method: full", "method", "full"), ("colour: blue", "colour", Colour.BLUE),
        ("pair: a", "pair", "a"), ("pair: [a, b]", "pair", ["a", "b"]),
    ],
)  # fmt: skip
def test_values_in_the_file(config: Write, line: str, name: str, value: object) -> None:
    found = getattr(both("--config", config(f"dataset: d\n{line}\n"))[0], name)
    assert found == value or (isinstance(value, enum.Enum) and found == value.value)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--rate", "1e-4"], "rate", 1e-4), (["--sizes", "1", "2"], "sizes", [1, 2]), (["--name", "x"], "name", "x"),
        (["--tasks", "{seqrec: 1, item2index: 1e-1}"], "tasks", {"seqrec": 1, "item2index": 0.1}),
        (["--method", "full"], "method", "full"), (["--name", "--config-like"], "name", None),
        (["--limit", "7"], "limit", 7),
    ],
)  # fmt: skip
def test_values_on_the_command_line(argv: list[str], name: str, value: object) -> None:
    if value is None:  # a flag where a value belongs
        with pytest.raises(UserError):
            both("--dataset", "d", *argv)
    else:
        assert getattr(both("--dataset", "d", *argv)[0], name) == value


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("steps: 1.5", r"steps=1\.5 \(float\) does not fit, expected int"),
        ("steps: many", r"steps='many' \(str\) does not fit, expected int"),
        ("steps: true", r"steps=True \(bool\) does not fit, expected int"),
        ("steps: null", r"steps=None \(NoneType\) does not fit, expected int"),
        ("rate: fast", r"rate='fast' \(str\) does not fit, expected float"),
        ("rate: [1]", r"rate=\[1\] \(list\) does not fit"),
        ("name: 5", r"name=5 \(int\) does not fit, expected str \| None"),
        ("keep: 1", r"keep=1 \(int\) does not fit, expected bool"),
        ("keep: 'true'", r"keep='true' \(str\) does not fit, expected bool"),
        ("sizes: 64", r"sizes=64 \(int\) does not fit, expected list\[int\]"),
        ("sizes: [64, x]", r"sizes=\[64, 'x'\] \(list\) does not fit"),
        ("paths: a", r"paths='a' \(str\) does not fit, expected list\[str\]"),
        ("tasks: seqrec", r"tasks='seqrec' \(str\) does not fit, expected dict\[str, float\]"),
        ("tasks: {seqrec: much}", r"tasks=\{'seqrec': 'much'\} \(dict\) does not fit"),
        ("tasks: {1: 1}", r"tasks=\{1: 1\} \(dict\) does not fit"),
        ("method: qlora", r"method='qlora' \(str\) does not fit, expected one of full, lora"),
        ("colour: green", r"colour='green' \(str\) does not fit"),
    ],
)
def test_a_value_of_the_wrong_kind_in_the_file(config: Write, line: str, expected: str) -> None:
    path = config(f"dataset: d\n{line}\n")
    with pytest.raises(UserError, match=expected) as caught:
        both("--config", path)
    assert str(caught.value).startswith(f"{path}: "), "the message says where"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--steps", "many"], r"argument --steps: invalid int value: 'many'"),
        (["--steps", "1.5"], r"argument --steps: invalid int value"),
        (["--rate", "fast"], r"argument --rate: invalid float value"),
        (["--keep", "maybe"], r"argument --keep: .*maybe"),
        (["--method", "qlora"], r"argument --method: invalid choice: 'qlora'"),
        (["--tasks", "seqrec"], r"argument --tasks: 'seqrec' does not fit, expected dict\[str, float\]"),
        (["--tasks", "{seqrec: much}"], r"argument --tasks: .*does not fit"),
        (["--tasks", "{seqrec: ["], r"argument --tasks: .*does not fit"),
        (["--steps"], r"argument --steps: expected one argument"),
        (["stray"], r"unexpected words on the command line: stray"),
    ],
)
def test_a_value_of_the_wrong_kind_on_the_command_line(argv: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        both("--dataset", "d", *argv)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("dataste", "dataset"), ("step", "steps"), ("taks", "tasks"), ("Shuffle", "shuffle"), ("windows", "window")],
)
def test_what_is_misspelt_names_the_nearest(config: Write, wrong: str, right: str) -> None:
    path = config(f"dataset: d\n{wrong}: 1\n")
    with pytest.raises(UserError, match=rf"stage\.yaml: unknown key '{wrong}'; did you mean '{right}'\?"):
        both("--config", path)
    for argv in ([f"--{wrong}", "1"], [f"--{wrong}=1"]):
        with pytest.raises(UserError, match=rf"unknown flag --{wrong}; did you mean '{right}'\?"):
            both("--dataset", "d", *argv)


@pytest.mark.parametrize("wrong", ["qqqq", "config", "7", "no_shuffle", "help"])
def test_a_key_like_nothing_lists_what_there_is_or_its_neighbour(config: Write, wrong: str) -> None:
    with pytest.raises(
        UserError, match=rf"unknown key '?{wrong}'?(; valid are colour, dataset, .*|; did you mean .*)"
    ):
        both("--config", config(f"dataset: d\n{wrong}: 1\n"))


def test_a_flag_is_not_abbreviated() -> None:
    with pytest.raises(UserError, match="unknown flag --step"):
        both("--dataset", "d", "--step", "3")
    with pytest.raises(UserError, match="unknown flag --no_step"):
        both("--dataset", "d", "--no_step")


def test_what_is_required(config: Write) -> None:
    with pytest.raises(UserError, match="dataset is required: set it in the YAML file or pass --dataset"):
        both()
    with pytest.raises(UserError, match="dataset is required"):
        both("--config", config("steps: 3\n"))
    assert both("--config", config("steps: 3\n"), "--dataset", "d")[0].dataset == "d"


@pytest.mark.parametrize(
    "argv", [["--config", "{}", "--config", "{}"], ["--config={}", "--steps", "1", "--config", "{}"]]
)
def test_one_file_only(config: Write, argv: list[str]) -> None:
    path = config("dataset: d\n")
    with pytest.raises(UserError, match="--config was given twice: give one file, and flags for what differs from it"):
        both(*(word.format(path) for word in argv))


def test_config_without_a_path() -> None:
    with pytest.raises(UserError, match="--config needs the path of a YAML file"):
        both("--dataset", "d", "--config")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", r"has to hold `key: value` lines, found list"),
        ("just words\n", r"has to hold `key: value` lines, found str"),
        ("", r"has to hold `key: value` lines, found NoneType"),
        ("a: [1\n", r"is not valid YAML: line 2: "),
        ("steps: 1\ndataset: d\nsteps: 2\n", r"is not valid YAML: line 3: key 'steps' is given twice"),
        ("tasks: {a: 1, a: 2}\n", r"is not valid YAML: line 1: key 'a' is given twice"),
        (
            "a: !!python/object/apply:os.getcwd []\n",
            r"not valid YAML: line 1: the tag !!python/.* is not supported",
        ),
    ],
)
def test_a_file_that_is_no_configuration(config: Write, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        read_yaml(config(text))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--config .*none\.yaml: no such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: Café\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml is not text in UTF-8: .* at byte 9"):
        read_yaml(tmp_path / "latin.yaml")


@pytest.mark.parametrize("window", [13, 14])
def test_a_rule_of_the_dataclass_is_the_users_mistake(window: int) -> None:
    with pytest.raises(UserError, match=rf"^window={window} .*; take 12$"):
        both("--dataset", "d", "--window", str(window))


def test_help_shows_defaults_and_needs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        both("--help")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "--dataset" in printed
    assert "how long to train (default: 10)" in printed


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return run(main)


def test_run_turns_mistakes_into_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["stage.py", "--key", "a b"])
    with pytest.raises(SystemExit) as ended:
        raising(UserError("k=0 has to be at least 1"))()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: k=0 has to be at least 1\n"
    with pytest.raises(SystemExit):
        raising(UserError("no column \x1b[2J\r\u202e"))()
    assert capsys.readouterr().err == "error: no column \\x1b[2J\\r\\u202e\n"
    with pytest.raises(SystemExit) as ended:
        raising(KeyboardInterrupt())()
    assert ended.value.code == 130
    assert capsys.readouterr().err == (
        "interrupted: nothing is unfinished; the same command goes on: python stage.py --key 'a b'\n"
    )


def test_run_hides_no_bug() -> None:
    with pytest.raises(ZeroDivisionError):
        raising(ZeroDivisionError())()
    done: list[Any] = []
    run(lambda: done.append(1))()
    assert done == [1]


def test_the_traceback_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REASONREC_TRACEBACK", "1")
    with pytest.raises(UserError, match="mistake"):
        raising(UserError("mistake"))()


STAGE = """
from dataclasses import asdict, dataclass
import json
from reasonrec.recipes.args import parse, run

@dataclass
class Config:
    dataset: str
    k: int = 3

def main() -> None:
    (config,) = parse([Config])
    print(json.dumps(asdict(config)))

run(main)()
"""


def test_a_stage_from_the_command_line(tmp_path: Path) -> None:
    def launch(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", STAGE, *argv], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    good = launch("--dataset", "d", "--k", "4")
    assert (good.returncode, json.loads(good.stdout)) == (0, {"dataset": "d", "k": 4})
    bad = launch("--datasets", "d")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: unknown flag --datasets; did you mean 'dataset'?\n"
