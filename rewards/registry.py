"""Rewards by name, and from anybody's file.

In a configuration, a reward is a registered name or `path/to/file.py:function`, with a weight. Weight 0 logs the
reward and changes nothing else. Options of a reward go beside its weight:

    rewards:
      rsvr: 1.0
      "examples/custom_reward.py:fresh_items": 0.2
      repetition: {weight: 0.1, n: 3}
      exact: {weight: 0.5, horizon: 3, decay: 0.8}
      length: 0

`horizon` and `decay` are options of every reward: see `rewards.ahead`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from reasonrec.rewards.ahead import Later, look_ahead
from reasonrec.rewards.calling import AHEAD, LARGEST, REQUIRABLE, Reward, RewardFunction, check_signature, own_options
from reasonrec.tokenizers.artefact import file_hash
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.registry import Registry, nearest
from reasonrec.tokenizers.terminal import one_line, shown

# One family a file; a new one is added here.
FAMILIES = (
    "exact", "prefix", "rank", "format", "length", "repetition", "collaborative", "likelihood", "sets", "consistency",
)  # fmt: skip

REWARDS: Registry[Reward] = Registry("reward", [f"reasonrec.rewards.{family}" for family in FAMILIES])

_F = TypeVar("_F", bound=RewardFunction)


def reward(*, name: str | None = None, requires: Sequence[str] = ()) -> Callable[[_F], _F]:
    """Register a reward function.

    Args:
        name: Name to select it by, the function's by default.
        requires: What has to be computed for it (`calling.REQUIRABLE`). Keywords of the function that are among these
            need not be repeated.

    Raises:
        UserError: If the name is taken, or the function cannot be called as a reward.

    Example:
        >>> @reward(name="short_answers")
        ... def short_answers(*, completions, **_):
        ...     return [1.0 / (1 + len(text)) for text in completions]
        >>> load_reward("short_answers")(completions=["abc"])
        [0.25]
    """

    def register(function: _F) -> _F:
        called = name or function.__name__
        known = REWARDS.registered(called)
        # The same file may be read twice; another one may not take the name away.
        if known is not None and _source(known.function) != _source(function):
            raise UserError(
                f"the reward {called!r} exists already ({_source(known.function)[0]}): choose another name"
            )
        REWARDS.add(called, _as_reward(called, function, requires), function.__module__, replace=True)
        return function

    return register


def names() -> list[str]:
    """Names of all registered rewards, those of the kit included."""
    return sorted(REWARDS.entries())


def load_reward(spec: str, options: Mapping[str, Any] | None = None) -> Reward:
    """Find a reward.

    Args:
        spec: A registered name, or `path/to/file.py:function`. The file is run.
        options: Values of the function's own keywords, `horizon` and `decay`.

    Raises:
        UserError: If there is no such name, file or function (names the nearest), if the file fails, if the function
            cannot be called as a reward, or if it has no such option.
    """
    found = _from_file(spec) if _is_file(spec) else REWARDS.find(spec)
    options, own = dict(options or {}), own_options(found.function)
    ahead = {name: options.pop(name) for name in AHEAD if name in options and name not in own}
    for option in options:
        if option not in own:
            raise UserError(f"reward {spec!r} has no option {option!r}{nearest(option, [*own, *AHEAD])}")
    if "decay" in ahead and "horizon" not in ahead:
        raise UserError(f"reward {spec!r}: decay={shown(ahead['decay'])} changes nothing without a horizon above 1")
    loaded = replace(found, options=options, **ahead)
    if "beam_items" in loaded.requires:
        _ = loaded.width  # refuses a k that is no length of a list, before anything is rolled out
    return loaded


@dataclass(frozen=True)
class RewardSpec:
    """How a reward counts.

    Attributes:
        weight: Factor in the sum; 0 logs only.
        options: Values of the function's own keywords.

    Raises:
        UserError: If the weight is no number, or above `calling.LARGEST` in size.
    """

    weight: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the weight."""
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= LARGEST:
            raise UserError(
                f"weight {one_line(weight, 60)} ({type(weight).__name__}): a weight is a finite number of at most "
                f"{LARGEST:g} in size, 0 logs only"
            )

    @classmethod
    def read(cls, spec: str, value: Any) -> RewardSpec:
        """The YAML form: a weight, or a mapping of `weight` and options.

        Raises:
            UserError: If it is neither.
        """
        try:
            options = dict(value) if isinstance(value, Mapping) else {"weight": value}
            if "weight" not in options:
                raise UserError(f"found {options}; write {{weight: 1.0, …}}")
            weight = options.pop("weight")
            # YAML reads 1e-3 as text.
            return cls(float(weight) if isinstance(weight, str) else weight, options)
        except ValueError as error:
            raise UserError(f"rewards: {spec!r}: {error}") from error


@dataclass(frozen=True)
class WeightedRewards:
    """The rewards of a run and their weights.

    Attributes:
        rewards: The rewards, in the order of the configuration.
        weights: Their weights.
    """

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names in logs: the function's where that is unique, else as configured."""
        return tuple(reward.name for reward in self.rewards)

    @property
    def requires(self) -> tuple[str, ...]:
        """What has to be computed for any of them."""
        return tuple(sorted({name for reward in self.rewards for name in reward.requires}))

    @property
    def width(self) -> int:
        """Length of the widest list that one of them wants in `beam_items`; 0 if none does."""
        return max((reward.width for reward in self.rewards if "beam_items" in reward.requires), default=0)

    @property
    def horizon(self) -> int:
        """How many targets, from the next one on, the reward that looks farthest ahead is told."""
        return max(reward.horizon for reward in self.rewards)

    def check_policy(self, policy: str, given: Mapping[str, Collection[str]]) -> None:
        """Refuse rewards that read what the policy of the run does not give them.

        Args:
            policy: Its name.
            given: What each policy gives, of the keywords in `calling.OF_POLICY`.

        Raises:
            UserError: If a reward cannot do without a keyword that the policy does not give.
        """
        for reward in self.rewards:
            if missing := [name for name in reward.of_policy if name not in given[policy]]:
                others = [name for name, keywords in given.items() if {*missing} <= {*keywords}]
                raise UserError(
                    f"reward {reward.name!r} reads {', '.join(missing)}, which the policy {policy} does not give; "
                    + (f"policies that do are {', '.join(others)}" if others else "no policy does")
                )

    def __call__(self, *, later: Sequence[Later] = (), **batch: Any) -> NDArray[np.float64]:
        """Score a batch with each reward.

        Args:
            later: The targets behind the next one, for rewards that look ahead.
            **batch: Keywords of `calling.KEYWORDS`.

        Returns:
            Rewards (completions, rewards), NaN where a reward said None.

        Raises:
            UserError: As `Reward`.
        """
        columns = [look_ahead(reward, batch, later) for reward in self.rewards]
        return np.stack(columns, axis=1)

    def total(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The weighted sum that training optimises.

        Args:
            values: Rewards (completions, rewards), NaN for None.

        Returns:
            Sums (completions,). A None counts as 0, and where all that have a weight said None, the sum is NaN: the
            completion cannot be scored. What has weight 0 takes no part in that.
        """
        counted = np.array(self.weights) != 0
        values, weights = values[:, counted], np.array(self.weights)[counted]
        total = np.nansum(values * weights, axis=1)
        return np.where(np.isnan(values).all(axis=1), np.nan, total)


def load_rewards(config: Mapping[str, Any]) -> WeightedRewards:
    """Load the rewards of a configuration.

    Args:
        config: Name or `file.py:function` to weight, or to a mapping of `weight` and options.

    Raises:
        UserError: If a reward or weight is wrong, or nothing has a weight.
    """
    specs = {spec: RewardSpec.read(spec, value) for spec, value in config.items()}
    if not any(spec.weight for spec in specs.values()):
        raise UserError(f"rewards={dict(config)}: nothing is rewarded; give at least one reward a weight other than 0")
    found = [load_reward(name, spec.options) for name, spec in specs.items()]
    short = [reward.name for reward in found]
    named = [
        reward if short.count(reward.name) == 1 else replace(reward, name=spec)
        for spec, reward in zip(specs, found, strict=True)
    ]
    return WeightedRewards(tuple(named), tuple(float(spec.weight) for spec in specs.values()))


def reward_files(config: Mapping[str, Any]) -> dict[str, str]:
    """The files that the rewards of a configuration come from: these decide a training as the configuration does.

    Args:
        config: Name or `file.py:function` to weight, as `load_rewards` takes it.

    Returns:
        Name of each file, without its folder, to the SHA-256 of its content, of all that share the name; rewards of
        the kit have none.
    """
    files = {Path(spec.rpartition(":")[0] if ":" in spec else spec) for spec in config if _is_file(spec)}
    found: dict[str, list[str]] = {}
    for file in sorted(files):
        found.setdefault(file.name, []).append(file_hash(file))
    return {name: "+".join(hashes) for name, hashes in found.items()}


def _is_file(spec: str) -> bool:
    return ":" in spec or "/" in spec or spec.endswith(".py")


def _as_reward(name: str, function: Any, requires: Sequence[str]) -> Reward:
    requires = (requires,) if isinstance(requires, str) else tuple(requires)
    for wanted in requires:
        if wanted not in REQUIRABLE:
            raise UserError(f"reward {name!r} requires {wanted!r}{nearest(wanted, REQUIRABLE)}")
    return Reward(name, function, tuple(sorted({*requires, *check_signature(name, function)})))


def _from_file(spec: str) -> Reward:
    file, _, function = spec.rpartition(":") if ":" in spec else (spec, "", "")
    path = Path(file)
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.py")]) if path.parent.is_dir() else ""
        raise UserError(f"reward {spec!r}: there is no file {file}{near or '; paths start where the command runs'}")
    module = _run_file(path, spec)
    own = [
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
    ]
    if not function or not hasattr(module, function):
        problem = f"{file} has no function {function!r}" if function else "write path/to/file.py:function"
        raise UserError(f"reward {spec!r}: {problem}{nearest(function, own) if own else '; the file defines none'}")
    value = getattr(module, function)
    declared = next((r for r in REWARDS.entries().values() if r.function is value), None)
    return declared or _as_reward(function, value, ())


def _run_file(path: Path, spec: str) -> ModuleType:
    """Import a file as a module of its own; one that did not change is not run again."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"reward {spec!r}: {path} cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(str(path.resolve()).encode() + b"\0" + text).hexdigest()[:12]
    name = f"reasonrec_reward_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    made = importlib.util.spec_from_file_location(name, path.resolve())
    if made is None or made.loader is None:
        raise UserError(f"reward {spec!r}: {path} is not a Python file")
    module = importlib.util.module_from_spec(made)
    REWARDS.entries()  # the kit's come first: it is the file that takes one of their names
    sys.modules[name] = module
    try:
        made.loader.exec_module(module)
    except UserError:
        del sys.modules[name]
        raise
    except (Exception, SystemExit) as error:  # a script that ends itself would end the training with status 0
        del sys.modules[name]
        raise UserError(
            f"reward {spec!r}: running {path} failed with {one_line(type(error).__name__, 60)}: {one_line(error)}"
        ) from error
    return module


def _source(function: Any) -> tuple[str, str]:
    code = getattr(function, "__code__", None)
    return (code.co_filename if code else repr(function), getattr(function, "__qualname__", ""))
