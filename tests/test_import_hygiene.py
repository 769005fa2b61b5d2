"""What keeps the house in order and shows in the sources: imports, names, sizes, and what is never written."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each room may import of the kit besides itself.
ROOMS = {
    "tokenizers": set(),
    "data_gen": {"tokenizers"},
    "rewards": {"tokenizers"},
    "recipes": {"tokenizers", "data_gen", "rewards"},
}
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
STAGES = [path for path in (ROOT / "recipes").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OTHERS = [*TESTS, *(ROOT / "examples").rglob("*.py")]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_source = pytest.mark.parametrize("path", SOURCES, ids=relative)
every_file = pytest.mark.parametrize("path", [*SOURCES, *OTHERS], ids=relative)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("reasonrec", *parts)).removesuffix(".__init__")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), relative(path))


def python(code: str, *argv: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


IMPORT_ALL = """
import importlib, json, sys
folder, *names = sys.argv[1:]
if folder:
    sys.path[0] = folder  # as `python folder/script.py` has it
for name in names:
    importlib.import_module(name)
import tokenizers
print(json.dumps([tokenizers.__file__, hasattr(tokenizers, "Tokenizer")]))
"""


@pytest.mark.parametrize("where", ["repository", "script"])
def test_everything_can_be_imported_and_hides_no_library(where: str, tmp_path: Path) -> None:
    """With the repository's root first on the path, and launched as a script from another folder."""
    cwd, first = (ROOT, "") if where == "repository" else (tmp_path, str(ROOT / "recipes"))
    file, real = json.loads(python(IMPORT_ALL, first, *map(module_name, SOURCES), cwd=cwd))
    assert real
    assert not Path(file).is_relative_to(ROOT / "tokenizers")


def test_light_modules_stay_light(tmp_path: Path) -> None:
    """Reading a manifest or a configuration is no reason to wait for PyTorch."""
    code = (
        "import sys\n"
        "import reasonrec.recipes.args, reasonrec.tokenizers.artefact, reasonrec.tokenizers.errors\n"
        "print([m for m in ('torch', 'trl', 'polars', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    assert python(code, cwd=tmp_path) == "[]"


def test_recommending_needs_no_trl(tmp_path: Path) -> None:
    """What trains knows TRL; what recommends, in both modes, starts without it."""
    code = (
        "import sys\n"
        "import reasonrec.recipes.recommender, reasonrec.recipes.rankers.reasoning, reasonrec.recipes.recommend\n"
        "import reasonrec.recipes.rankers.pool\n"
        "print([m for m in ('trl', 'datasets') if m in sys.modules])"
    )
    assert python(code, cwd=tmp_path) == "[]"


def test_models_are_called_below_their_head_in_one_place() -> None:
    """What a sharded model needs there is then written once."""
    calls = {relative(path) for path in SOURCES if ".base_model(" in path.read_text(encoding="utf-8")}
    assert calls == {"recipes/decoding/backbone.py"}


def test_no_package_markers_where_they_would_hide_a_library() -> None:
    assert not (ROOT / "tokenizers" / "__init__.py").exists(), "it would hide Hugging Face's tokenizers"
    assert not [relative(path) for path in TESTS if path.name == "__init__.py"]


@pytest.mark.parametrize("folder", ["recipes", "tests/benchmarks"])
def test_nothing_beside_a_script_is_named_like_a_library(folder: str) -> None:
    """The folder of a script is the first place where Python looks."""
    names = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or path.is_dir()}
    names -= {"__init__", "__pycache__"}
    assert names
    assert not [name for name in sorted(names) if importlib.util.find_spec(name) is not None]


@every_source
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names = [node.module or ""] if node.module != "reasonrec" else [f"reasonrec.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "reasonrec":
                assert rest.split(".")[0] in ROOMS[room] | {room}, f"line {node.lineno}: {room} imports {name}"


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def forbidden(module: ast.Module) -> Iterator[str]:
    """What is never written, wherever it stands."""
    for node in ast.walk(module):
        at = f"line {getattr(node, 'lineno', 0)}: "
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                if name.split(".")[0] in {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}:
                    yield f"{at}{name}"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
            yield f"{at}sys.path"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in {"eval", "exec", "compile", "__import__"}:
                yield f"{at}{called}()"
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if called == "torch.load" and not is_true(keywords.get("weights_only")):
                yield f"{at}torch.load that may unpickle"
            loads = called == "SentenceTransformer" or called.endswith(".from_pretrained")
            if loads and not called.startswith("Peft") and "trust_remote_code" not in keywords:
                yield f"{at}{called}() that may ask on a terminal whether to run code"
            for name in ("trust_remote_code", "allow_pickle", "drop_last"):
                if is_true(keywords.get(name)):
                    yield f"{at}{name}=True"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            positional = [*arguments.posonlyargs, *arguments.args]
            pairs = [*zip(reversed(positional), reversed(arguments.defaults), strict=False)]
            pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)  # type: ignore[arg-type]
            if any(argument.arg == "trust_remote_code" and is_true(default) for argument, default in pairs):
                yield f"{at}trust_remote_code is on by default"
        elif (
            isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "trust_remote_code" and is_true(node.value)
        ):
            yield f"{at}trust_remote_code is on by default"


@every_source
def test_what_is_never_written(path: Path) -> None:
    assert not list(forbidden(tree(path)))


# `say` and `UserError` write out what an id or a title of others would do to a terminal.
MAY_PRINT = {"tokenizers/terminal.py"}


@every_source
def test_what_is_printed_is_made_visible(path: Path) -> None:
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    lines = [node.lineno for node in calls if ast.unparse(node.func) in {"print", "sys.stdout.write"}]
    assert not lines or relative(path) in MAY_PRINT, f"lines {lines}: say() of tokenizers/terminal.py"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import joblib.pool", "eval('1')", "sys.path.insert(0, '.')",
        "load(trust_remote_code=True)", "def f(*, trust_remote_code=True): pass",
        "def f(a, trust_remote_code=True): pass", "class C:\n    trust_remote_code: bool = True",
        "np.load('x', allow_pickle=True)", "torch.load('x')",
        "DataLoader(x, drop_last=True)", "AutoConfig.from_pretrained('x')", "SentenceTransformer('x', **options)",
    ],
)  # fmt: skip
def test_the_check_itself(code: str) -> None:
    assert list(forbidden(ast.parse(code)))


def test_no_file_of_odds_and_ends() -> None:
    assert not [relative(path) for path in [*SOURCES, *OTHERS] if path.stem in {"utils", "util", "helpers", "misc"}]


@every_file
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    most = 199 if path in STAGES else 399
    assert lines <= most, f"{lines} lines; split it"


def public_without_docstring(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        decorators = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
        if not ast.get_docstring(node) and not decorators & {"overload", "setter"}:
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from public_without_docstring(node.body, f"{prefix}{node.name}.")


@every_source
def test_what_is_public_is_documented(path: Path) -> None:
    module = tree(path)
    assert ast.get_docstring(module), "the module has no docstring"
    assert not list(public_without_docstring(module.body))


@pytest.mark.parametrize("path", STAGES, ids=relative)
def test_a_stage_says_how_it_is_launched_and_guards_its_main(path: Path) -> None:
    module = tree(path)
    assert f"accelerate launch {relative(path)} --" in (ast.get_docstring(module) or "")
    assert ast.unparse(module.body[-1]) == "if __name__ == '__main__':\n    run(main)()"


def test_no_path_of_one_machine() -> None:
    files = [*SOURCES, *OTHERS, *ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "Makefile", ROOT / ".ci" / "run"]
    files += [path for suffix in ("yaml", "md") for path in (ROOT / "recipes" / "configs").rglob(f"*.{suffix}")]
    found = re.compile(r"""(?<![\w.}>/])/(work|root|home|Users)/\w""")
    assert not [relative(path) for path in files if found.search(path.read_text(encoding="utf-8"))]
