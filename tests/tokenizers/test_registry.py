"""What is chosen by name."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.registry import Registry, nearest


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> Registry[int]:
    for name in ("letters_one", "letters_two"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    found: Registry[int] = Registry("letter", ["letters_one", "letters_two"])
    for name, number, module in (("mine", 9, "elsewhere"), ("beta", 2, "letters_two"), ("alpha", 1, "letters_one")):
        found.add(name, number, module)
    return found


def test_entries_stand_in_the_order_of_their_modules(letters: Registry[int]) -> None:
    assert letters.entries() == {"alpha": 1, "beta": 2, "mine": 9}
    assert list(letters.entries()) == ["alpha", "beta", "mine"]
    assert letters.find("beta") == 2


def test_a_miss_names_the_nearest(letters: Registry[int]) -> None:
    with pytest.raises(UserError, match=r"^letter 'bata' is unknown \(did you mean 'beta'\?\); known are alpha, beta"):
        letters.find("bata")
    with pytest.raises(UserError, match=r"^letter 'zzzz' is unknown; known are alpha, beta, mine$"):
        letters.find("zzzz")
    with pytest.raises(ValueError, match="two entries are called 'beta' as letter"):
        letters.add("beta", 3, "elsewhere")


def test_a_name_may_be_given_anew(letters: Registry[int]) -> None:
    assert letters.registered("beta") == 2
    letters.add("beta", 3, "elsewhere", replace=True)
    assert (letters.registered("beta"), letters.registered("gamma")) == (3, None)
    assert letters.entries() == {"alpha": 1, "mine": 9, "beta": 3}


@pytest.mark.parametrize(
    ("name", "said"),
    [("bata", "; did you mean 'beta'?"), ("zzzz", "; valid are alpha, beta"), ("", "; valid are alpha, beta")],
)
def test_the_nearest_of_some_names(name: str, said: str) -> None:
    assert nearest(name, ["beta", "alpha"]) == said
    assert nearest(name, []) == ""
    assert nearest(name, ["gamma"], "; look it up") == "; look it up"
