"""What a launch may ask of accelerate's engines."""

from __future__ import annotations

import pytest

from reasonrec.recipes.trainers.engine import FSDP, check_engine, check_shares, is_sharded
from reasonrec.tokenizers.errors import UserError


@pytest.fixture
def fsdp(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, _, needed, _ in FSDP:
        monkeypatch.setenv(name, needed)
    return monkeypatch


def test_what_the_shipped_configuration_asks_for_is_taken(fsdp: pytest.MonkeyPatch) -> None:
    check_engine()
    assert is_sharded()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("FSDP_VERSION", "1", "fsdp_version=1 of this launch has to be 2"),
        (
            "FSDP_STATE_DICT_TYPE",
            "FULL_STATE_DICT",
            "fsdp_state_dict_type=FULL_STATE_DICT of this",
        ),
        (
            "FSDP_CPU_RAM_EFFICIENT_LOADING",
            "true",
            "fsdp_cpu_ram_efficient_loading=true of this",
        ),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "the stage's own activation_checkpointing decides"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "asks for DeepSpeed, and the trainings here know FSDP"),
    ],
)
def test_what_no_training_can_use_is_refused(fsdp: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    fsdp.setenv(name, value)
    with pytest.raises(UserError, match=said):
        check_engine()


def test_whole_weights_where_shards_were_asked_for_are_refused(fsdp: pytest.MonkeyPatch) -> None:
    class Trainer:
        is_fsdp_enabled = False

    with pytest.raises(UserError, match="two or more processes with a GPU each"):
        check_shares(Trainer())
    fsdp.delenv("ACCELERATE_USE_FSDP")
    check_shares(Trainer())
