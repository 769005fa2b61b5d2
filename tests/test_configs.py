"""Every file that a person can launch or follow: configurations, the Makefile's commands, paths in the documents."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from reasonrec.recipes.args import build, parse
from reasonrec.recipes.keys import KeyTable
from reasonrec.recipes.trainers.grpo_arguments import GrpoArguments
from reasonrec.recipes.trainers.item_sft import SftArguments
from reasonrec.tokenizers.errors import UserError

ROOT = Path(__file__).parents[1]
ALL = sorted((ROOT / "recipes" / "configs").glob("*/*.yaml"))
CONFIGS = [path for path in ALL if path.parent.name != "accelerate"]
HARDWARE = [path for path in ALL if path.parent.name == "accelerate"]
LAUNCH = re.compile(r"# accelerate launch (recipes/(\w+)\.py) --config (\S+)")


def name(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


every_config = pytest.mark.parametrize("path", CONFIGS, ids=name)


def launch_line(path: Path) -> re.Match[str]:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    match = LAUNCH.fullmatch(first)
    assert match, f"{path.relative_to(ROOT)} has to open with its launch line, not with {first!r}"
    return match


class Asked(Exception):
    """Carries the dataclasses that a stage parses its command line into."""


@pytest.fixture
def classes(path: Path, monkeypatch: pytest.MonkeyPatch) -> Sequence[type | KeyTable]:
    """What the stage of a configuration itself asks `parse` for."""

    def ask(wanted: Sequence[type | KeyTable], argv: Sequence[str] | None = None) -> None:
        raise Asked(wanted)

    stage = importlib.import_module(f"reasonrec.recipes.{launch_line(path)[2]}")
    with monkeypatch.context() as patch:
        patch.setattr(stage, "parse", ask)
        with pytest.raises(Asked) as asked:
            stage.main()
    return asked.value.args[0]


def test_there_is_something_to_check() -> None:
    assert {path.parent.name for path in CONFIGS} >= {"demo", "industrial", "basket", "synthetic", "example"}
    assert {path.stem for path in HARDWARE} == {"cpu", "single_gpu", "multi_gpu", "fsdp2", "multi_node"}
    assert not list((ROOT / "recipes" / "configs").glob("*.yaml")), "each belongs to a recipe"


@every_config
def test_the_first_line_launches_this_file(path: Path) -> None:
    match = launch_line(path)
    assert (ROOT / match[1]).is_file()
    assert match[3] == path.relative_to(ROOT).as_posix()


@every_config
def test_it_parses(
    path: Path, classes: Sequence[type | KeyTable], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parsed = parse(classes, ["--config", str(path)])
    arguments = {"sft": SftArguments, "grpo": GrpoArguments}.get(path.stem.rpartition("_")[2])
    built = [build(arguments, part) if isinstance(part, dict) and arguments else part for part in parsed]
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert values["output_dir"].startswith(f"runs/{path.parent.name}/")
    for key, value in values.items():
        held = [getattr(part, key) for part in built if hasattr(part, key)]
        assert held, f"{key} is read by nobody"
        if isinstance(value, int | float | str):
            assert value in held, f"{key} was given as {value!r} and became {held}"
    assert not list(tmp_path.iterdir()), "parsing writes nothing"


@every_config
def test_help_is_printed(path: Path, classes: Sequence[type | KeyTable], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(classes, ["--help"])
    assert ended.value.code == 0
    assert "--output_dir" in capsys.readouterr().out


@every_config
def test_a_misspelt_key_is_refused(path: Path, classes: Sequence[type | KeyTable], tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for key in list(yaml.safe_load(text))[:3]:
        wrong = tmp_path / "wrong.yaml"
        wrong.write_text(f"{text}\n{key}z: 1\n", encoding="utf-8")
        with pytest.raises(UserError, match=f"unknown key '{key}z'; did you mean '{key}'"):
            parse(classes, ["--config", str(wrong)])


@pytest.mark.parametrize("path", HARDWARE, ids=name)
def test_accelerate_reads_its_configurations(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(
        f"# accelerate launch --config_file {path.relative_to(ROOT).as_posix()} recipes/<stage>.py "
    )
    config = load_config_from_file(str(path))
    kinds = {
        "multi_gpu": DistributedType.MULTI_GPU,
        "multi_node": DistributedType.MULTI_GPU,
        "fsdp2": DistributedType.FSDP,
    }
    assert config.use_cpu == (path.stem == "cpu")
    assert config.distributed_type == kinds.get(path.stem, DistributedType.NO)
    assert (config.num_machines, config.num_processes) == {
        "multi_gpu": (1, 2), "fsdp2": (1, 2), "multi_node": (2, 8),
    }.get(path.stem, (1, 1))  # fmt: skip
    assert config.mixed_precision == "no", "each stage decides"


def test_the_plugin_of_the_sharded_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate makes of it, and the trainings take."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    from reasonrec.recipes.trainers.engine import check_engine, is_sharded

    path = ROOT / "recipes" / "configs" / "accelerate" / "fsdp2.yaml"
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "stage.py"]))
    for name, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, value)
    check_engine()
    assert is_sharded()
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing


def test_a_launch_on_the_cpu_is_quiet_and_has_its_threads(tmp_path: Path) -> None:
    """As the Makefile launches: nothing of accelerate's own between what a stage prints."""
    script = tmp_path / "script.py"
    script.write_text("import os\nprint(os.environ['OMP_NUM_THREADS'], os.environ['ACCELERATE_USE_CPU'])\n")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    cpu = ROOT / "recipes" / "configs" / "accelerate" / "cpu.yaml"
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "3", "HOME": str(tmp_path)}
    done = subprocess.run(
        [*command, str(cpu), str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "3 True\n", "")


@pytest.fixture
def dry_run(tmp_path: Path) -> Path:
    """The Makefile in a folder where nothing has been made yet."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for file in ("pyproject.toml", "constraints.txt"):
        (tmp_path / file).touch()
    return tmp_path


def commands(folder: Path, *words: str) -> list[str]:
    done = subprocess.run(
        ["make", "-n", "VENV=.venv", *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_demo_runs_what_is_missing_and_nothing_twice(dry_run: Path) -> None:
    stages = (
        "prepare", "index_items", "sft", "grpo", "fuse", "eval_ranking", "publish", "synthesize", "sft",
        "judge_reasoning", "eval_ranking", "recommend",
    )  # fmt: skip
    folders = (
        "dataset", "index", "sft", "grpo", "fused", "report", "published", "traces", "reason_sft", "judged",
        "reasoning_report",
    )  # fmt: skip

    def planned() -> list[str]:
        lines = "\n".join(commands(dry_run, "demo"))
        return re.findall(r"accelerate launch .*?recipes/(\w+)\.py", lines)

    assert planned() == list(stages)
    assert sum("pip install" in line for line in commands(dry_run, "demo")) == 2
    (dry_run / ".venv").mkdir()
    (dry_run / ".venv" / ".reasonrec-installed").touch()
    assert not any("pip" in line for line in commands(dry_run, "demo"))
    for done, folder in enumerate(folders, start=1):
        (dry_run / "runs" / "demo" / folder).mkdir(parents=True)
        (dry_run / "runs" / "demo" / folder / "manifest.json").touch()
        assert planned() == list(stages[done:])


def test_the_demo_reads_what_it_made(dry_run: Path) -> None:
    """Each stage's output is what the Makefile waits for and what the next one's configuration reads."""
    lines = "\n".join(commands(dry_run, "demo"))
    used = [ROOT / config for config in re.findall(r"--config (\S+)", lines)]
    assert [path.parent.name for path in used] == ["demo"] * 11
    values = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in used]
    outputs = [value["output_dir"] for value in values]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"= {output}/manifest.json\n" in makefile for output in outputs)
    dataset, index, model, reinforced, fused, report, published, traces, reasoning, *_ = outputs
    assert all(value["dataset"] == dataset for place, value in enumerate(values) if place not in (0, 3, 4, 6, 9))
    assert values[2]["index"] == values[7]["index"] == values[8]["index"] == index
    assert values[3]["model"] == values[4]["model"] == model
    assert values[5]["models"] == [model, reinforced, fused]
    assert (values[6]["model"], values[6]["report"]) == (fused, report), "who ranks best has the last word"
    assert (values[8]["model"], values[8]["traces"]) == (model, traces)
    assert (values[9]["model"], values[9]["direct"]) == (reasoning, model)
    assert values[10]["models"] == values[10]["reasoning_models"] == [reasoning]
    assert f"--model {published} " in lines


@pytest.mark.parametrize("hardware", [path.stem for path in HARDWARE])
def test_the_makefile_finds_its_files(dry_run: Path, hardware: str) -> None:
    lines = "\n".join(commands(dry_run, "demo", f"HARDWARE={hardware}"))
    paths = set(re.findall(r"recipes/[\w./]+\.(?:py|yaml)", lines))
    assert f"recipes/configs/accelerate/{hardware}.yaml" in paths
    assert not [path for path in paths if not (ROOT / path).is_file()]


RECIPES = sorted({path.parent for path in CONFIGS})
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(found for room in ("docs", "examples", "recipes") for found in (ROOT / room).rglob("*.md"))]
)
PATHS = re.compile(r"(?<![\w./-])(?:recipes|rewards|data_gen|tokenizers|tests|examples)/[\w./<>*-]*")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_says_how_it_is_run(recipe: Path) -> None:
    lines = (recipe / "README.md").read_text(encoding="utf-8").splitlines()
    wanted = {launch_line(path)[0].removeprefix("# ") for path in CONFIGS if path.parent == recipe}
    assert wanted <= set(lines)


@every_document
def test_links_lead_somewhere(document: Path) -> None:
    for path, anchor in LINK.findall(document.read_text(encoding="utf-8")):
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), path
        if anchor:
            titles = re.findall(r"(?m)^#+ (.+)$", target.read_text(encoding="utf-8"))
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@every_document
def test_documents_name_what_is_there(document: Path) -> None:
    named = {path.rstrip(".") for path in PATHS.findall(document.read_text(encoding="utf-8"))}
    named = {path for path in named if "<" not in path and "*" not in path}
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


def test_constraints_pin_every_direct_dependency_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(package): version for package, version in pins.items()}
    wanted = {canonicalize_name(Requirement(text).name): Requirement(text).specifier for text in ranges}
    assert pinned.keys() == wanted.keys()
    assert not [package for package, specifier in wanted.items() if pinned[package] not in specifier]
    assert not [version for version in pinned.values() if "+" in version], "a local build is not to be had elsewhere"
