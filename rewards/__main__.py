"""Look at rewards, and try your own before a training run does.

python -m reasonrec.rewards list
python -m reasonrec.rewards check examples/custom_reward.py:fresh_items

`check` runs the reward in a process of its own, within limits, and does not show what it prints. It ends with status 1
if the reward cannot be used (it hangs, crashes or breaks a rule), and with 2 if it cannot be loaded.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence

from reasonrec.rewards.calling import CONTEXT, KEYWORDS, REQUIRABLE, ROWS
from reasonrec.rewards.check import Finding
from reasonrec.rewards.registry import RewardSpec, load_reward, names
from reasonrec.rewards.sandbox import Limits, check_apart
from reasonrec.tokenizers.environment import expand_home, wait_passively
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import one_line, say
from reasonrec.tokenizers.yaml_files import load_yaml

_LONGEST = 1200  # characters of a line


def list_rewards() -> None:
    """Print the registered rewards and the keywords that a reward can ask for."""
    for name in names():
        reward = load_reward(name)
        first = (inspect.getdoc(reward.function) or "").split("\n")[0]
        needs = f" [requires {', '.join(reward.requires)}]" if reward.requires else ""
        say(f"{name:<14} {first}{needs}")
    say("\nKeywords of a reward (name those you want, and end with **_):")
    for name in KEYWORDS:
        kind = "on request" if name in REQUIRABLE else "always" if name in {*ROWS, *CONTEXT} else ""
        say(f"{name:<16} {kind:<11} {KEYWORDS[name]}")


def report(spec: str, found: Finding) -> None:
    """Print what a check found."""
    for mode, rows in found.values.items():
        say(f"{one_line(spec)}, {mode} mode")
        for case, value in rows:
            say(f"  {'None' if value is None else format(value, '.4f'):>9}  {case.kind:<12} {case.name}")
    for note in found.notes:
        say(f"note: {one_line(note, _LONGEST)}")
    for warning in found.warnings:
        say(f"warning: {one_line(warning, _LONGEST)}")
    for violation in found.violations:
        say(f"violation: {one_line(violation, _LONGEST)}")
    say("it cannot be used as it is" if found.violations else "it can be used")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Words of the command line, `sys.argv[1:]` by default.

    Returns:
        Exit status: 0, 1 for a reward that breaks a rule, 2 for one that cannot be loaded.
    """
    wait_passively()  # a reward of the user's may import PyTorch
    parser = argparse.ArgumentParser(prog="python -m reasonrec.rewards", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="registered rewards, and what a reward can ask for")
    check = commands.add_parser("check", help="try a reward on golden, adversarial and malformed completions")
    check.add_argument("reward", help="a registered name, or path/to/file.py:function")
    check.add_argument("--options", default="{}", help="the reward's own keywords, as YAML: '{n: 4}'")
    check.add_argument("--strict", action="store_true", help="let warnings end with status 1 too")
    limits = Limits()
    check.add_argument(
        "--time_limit", type=float, default=limits.seconds, help="seconds for all of it (default: %(default)g)"
    )
    check.add_argument(
        "--memory_limit", type=float, default=limits.memory_gb, help="GiB for its process (default: %(default)g)"
    )
    options = parser.parse_args(argv)
    if options.command == "list":
        list_rewards()
        return 0
    try:
        try:
            own = load_yaml(options.options)
        except UserError as error:
            raise UserError(f"--options {options.options!r} is {error}") from error
        if not isinstance(own, dict):
            raise UserError(f"--options {options.options!r}: write a mapping, such as '{{n: 4}}'")
        name = expand_home(options.reward, "reward")
        spec = RewardSpec.read(name, {"weight": 1.0, **own})
        found = check_apart(name, spec.options, Limits(options.time_limit, options.memory_limit))
    except UserError as error:
        say(f"error: {error}", file=sys.stderr)
        return 2
    report(options.reward, found)
    return 1 if found.violations or (options.strict and found.warnings) else 0


if __name__ == "__main__":
    sys.exit(main())
