"""The console command: `reasonrec <stage> …` runs a stage in one process; `accelerate launch` runs it in several."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

from reasonrec.recipes.args import run
from reasonrec.recipes.keys import nearest
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import say

# In the order in which they are used; each is a script of the same name in this folder.
STAGES = {
    "prepare": "prepare",
    "describe": "describe",
    "index": "index_items",
    "synthesize": "synthesize",
    "sft": "sft",
    "grpo": "grpo",
    "judge": "judge_reasoning",
    "fuse": "fuse",
    "eval": "eval_ranking",
    "recommend": "recommend",
    "grow": "grow_catalogue",
    "publish": "publish",
    "serve": "serve",
    "doctor": "doctor",
}


def usage() -> str:
    """The stages, a line each: the first of their docstrings, read without importing them."""
    lines = ["usage: reasonrec <stage> [--config FILE] [--key value ...]", ""]
    for name, module in STAGES.items():
        source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
        lines.append(f"  {name:<11} {(ast.get_docstring(ast.parse(source)) or '').splitlines()[0]}")
    return "\n".join([*lines, "", "`reasonrec <stage> --help` shows the keys of a stage."])


@run
def main() -> None:
    """Run the stage that the command line names.

    Raises:
        UserError: If there is none of that name, or a mistake is in what follows.
    """
    name, words = next(iter(sys.argv[1:]), "--help"), sys.argv[2:]
    if name in ("-h", "--help", "help"):
        say(usage())
        return
    if name not in STAGES:
        raise UserError(f"there is no stage {name!r}{nearest(name, list(STAGES))}")
    sys.argv = [f"reasonrec {name}", *words]
    importlib.import_module(f"reasonrec.recipes.{STAGES[name]}").main()
