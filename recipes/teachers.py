"""The configuration of `recipes/synthesize.py`, and the teacher it names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from reasonrec.data_gen.reasoning.cases import Selection
from reasonrec.data_gen.reasoning.label_statistics import LabelField, LabelStatistics
from reasonrec.data_gen.reasoning.synthesis import OnMiss, hindsight_targets
from reasonrec.data_gen.reasoning.teachers.endpoint import EndpointSettings, EndpointTeacher, check_address
from reasonrec.data_gen.reasoning.teachers.grounded import GroundedTeacher
from reasonrec.data_gen.reasoning.teachers.local import LocalTeacher
from reasonrec.data_gen.reasoning.teachers.prompts import Asker, Asks, QuestionT
from reasonrec.data_gen.reasoning.teachers.reply_log import ReplyLog
from reasonrec.data_gen.reasoning.traces import Teacher
from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.tasks.reasoning import Mention
from reasonrec.recipes.keys import MAX_SEED, PRECISION_HELP, TRUST_HELP, PrecisionName
from reasonrec.tokenizers.artefact import adopt
from reasonrec.tokenizers.environment import is_first_process
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import say


def _help(text: str, **rules: Any) -> dict[str, Any]:
    return {"help": text, **rules}


@dataclass
class AskingConfig:
    """Keys of every stage that may ask an LLM.

    Raises:
        UserError: If the address is none, or a key stands where its name belongs.
    """

    dataset: str = field(metadata=_help("dataset folder (prepare.py)", path=True))
    output_dir: str = field(metadata=_help("output folder", path="name"))
    teacher_model: str | None = field(
        default=None, metadata=_help("the LLM: name at the endpoint, or as `model`", path=True)
    )
    endpoint: str = field(default="http://localhost:8000/v1", metadata=_help("base URL"))
    api_key_env: str = field(default="OPENAI_API_KEY", metadata=_help("environment variable that holds the key"))
    concurrency: int = field(default=8, metadata=_help("requests under way, or replies written together", at_least=1))
    requests_per_minute: float = field(default=600.0, metadata=_help("limit over all requests", above=0))
    timeout_s: float = field(
        default=60.0, metadata=_help("seconds for one request, to the last byte of its reply", above=0, at_most=86400)
    )
    max_reply_bytes: int = field(
        default=4 << 20, metadata=_help("longest reply of the endpoint; a longer one has failed", at_least=1)
    )
    retries: int = field(default=5, metadata=_help("further attempts", at_least=0))
    pause_s: float = field(default=1.0, metadata=_help("pause before the second attempt; it doubles", at_least=0))
    temperature: float = field(default=0.7, metadata=_help("sampling temperature of the endpoint", at_least=0))
    max_new_tokens: int = field(default=300, metadata=_help("longest reply of an LLM", at_least=1))
    replies: str | None = field(
        default=None, metadata=_help("log of replies; <output_dir>.replies.jsonl if unset", path="name")
    )
    precision: PrecisionName = field(default="auto", metadata=_help(PRECISION_HELP))
    trust_remote_code: bool = field(default=False, metadata=_help(TRUST_HELP))
    overwrite: bool = field(default=False, metadata=_help("move an existing output_dir aside"))

    def __post_init__(self) -> None:
        # Both are written into the manifest, whichever teacher it is.
        check_address(self.endpoint)
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):  # not repeated: it may be the key
            raise UserError(
                "api_key_env is the name of an environment variable (letters, digits and _), not the key itself: "
                "export OPENAI_API_KEY=…, or name another variable"
            )


@dataclass
class SynthesizeConfig(AskingConfig):
    """Configuration of the synthesize stage.

    Raises:
        UserError: If values contradict each other.
    """

    index: str | None = field(
        default=None, metadata=_help("item index; with model: measures chains in tokens", path=True)
    )
    model: str | None = field(default=None, metadata=_help("whose tokenizer measures chains", path=True))
    teacher: Literal["grounded", "endpoint", "local"] = field(
        default="grounded", metadata=_help("statistics, an OpenAI-compatible endpoint, or a model that runs here")
    )
    rows: int = field(default=3000, metadata=_help("moments of the training sequences", at_least=1))
    valid_rows: int = field(default=1000, metadata=_help("validation cases, for the leak test only", at_least=1))
    min_history: int = field(default=4, metadata=_help("shortest history in items", at_least=1))
    max_history: int = field(default=15, metadata=_help("longest history in items", at_least=1))
    label_field: LabelField = field(default="auto", metadata=_help("what kinds of items are: category or brand"))
    guesses: int = field(default=2, metadata=_help("labels of the blind guess", at_least=1))
    evidence_items: int = field(default=3, metadata=_help("grounded: items named as evidence", at_least=1))
    kept_items: int = field(default=4, metadata=_help("grounded: most items of the rewritten history", at_least=1))
    on_miss: OnMiss = field(
        default="strip", metadata=_help("formulation without a label of the target: strip, drop or keep")
    )
    mention: Mention = field(default="codes", metadata=_help("how chains name items: codes, titles, or both"))
    max_tokens: int = field(default=48, metadata=_help("longest chain, if index and model are given", at_least=1))
    hindsight: bool = field(default=False, metadata=_help("show the LLM what was chosen, and mark its traces"))
    filter_model: str | None = field(
        default=None,
        metadata=_help("trained model (sft.py) under which a chain has to raise the target's probability", path=True),
    )
    seed: int = field(default=0, metadata=_help("draws the cases", at_least=0, at_most=MAX_SEED))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_history > self.max_history:
            raise UserError(f"min_history={self.min_history} is above max_history={self.max_history}")
        if (self.index is None) != (self.model is None):
            raise UserError("index and model measure chains together: give both, or neither")
        if self.teacher != "grounded" and not self.teacher_model:
            raise UserError(f"teacher: {self.teacher} needs teacher_model")
        if self.teacher == "grounded" and (self.hindsight or self.teacher_model):
            raise UserError("teacher: grounded reads no LLM and is blind: remove hindsight and teacher_model")


def build_teacher(
    config: SynthesizeConfig, dataset: Dataset, statistics: LabelStatistics, selections: Iterable[Selection]
) -> Teacher:
    """The teacher that the configuration names."""
    if config.teacher == "grounded":
        return GroundedTeacher(
            statistics, evidence_items=config.evidence_items, kept_items=config.kept_items, guesses=config.guesses
        )
    asker = Asker(dataset.items, targets=hindsight_targets(*selections) if config.hindsight else None)
    return build_llm(config, config.teacher, asker, hindsight=config.hindsight)


def build_llm(
    config: AskingConfig, kind: Literal["endpoint", "local"], asker: Asks[QuestionT], *, hindsight: bool = False
) -> EndpointTeacher[QuestionT] | LocalTeacher[QuestionT]:
    """The LLM that the configuration names.

    Args:
        config: The configuration; `teacher_model` is set.
        kind: Where the LLM runs.
        asker: Makes the messages.
        hindsight: Whether they show what was chosen.
    """
    assert config.teacher_model is not None  # checked by the stage; this tells the type checker
    replies = Path(config.replies or f"{config.output_dir.rstrip('/')}.replies.jsonl")
    if kind == "endpoint":
        names = (
            "concurrency",
            "requests_per_minute",
            "timeout_s",
            "retries",
            "pause_s",
            "temperature",
            "max_reply_bytes",
        )
        settings = EndpointSettings(
            config.endpoint,
            config.teacher_model,
            os.environ.get(config.api_key_env),
            max_new_tokens=config.max_new_tokens,
            **{name: getattr(config, name) for name in names},
        )
        return EndpointTeacher(asker, settings, ReplyLog(replies), hindsight)
    # PyTorch, for this teacher only
    from reasonrec.recipes.models.load import load_base, load_tokenizer
    from reasonrec.recipes.models.precision import choose, load_finite
    from reasonrec.recipes.policies.sharing import each, this_launch

    launch = this_launch()
    with launch.main_process_first():  # it mends what a kill has torn
        log = ReplyLog(replies)
    launch.wait_for_everyone()  # before it writes what the others would read
    name, trust = config.teacher_model, config.trust_remote_code
    (model,), precision = load_finite(
        lambda chosen: (load_base(name, method="lora", precision=chosen, trust_remote_code=trust),),
        choose(config.precision),
        itemgetter(0),
    )
    model = model.to(precision.device).eval()
    if launch.is_main_process:
        say(f"{name}: {precision}")
    tokenizer = load_tokenizer(name, trust_remote_code=trust)
    shared = partial(each, place=(launch.process_index, launch.num_processes))
    return LocalTeacher(
        asker, model, tokenizer, name, log, hindsight, config.concurrency, config.max_new_tokens, shared
    )


def is_idle(teacher: str) -> bool:
    """Whether this process has nothing to do: not the first, unless the processes share what a local LLM writes.

    Args:
        teacher: Its kind.
    """
    return teacher != "local" and not is_first_process()


def adopted(teacher: str, out: Path, **about: Any) -> bool:
    """As `adopt`; all processes that are not idle come to know it.

    Args:
        teacher: Its kind.
        out: Folder of the finished artefact.
        **about: What `adopt` takes.
    """
    if teacher != "local":
        return adopt(out, **about)
    from reasonrec.recipes.policies.sharing import this_launch
    from reasonrec.recipes.trainers.resume import adopted as adopted_by_first  # PyTorch

    this_launch()
    return adopted_by_first(out, **about)
