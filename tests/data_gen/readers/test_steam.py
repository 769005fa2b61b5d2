import gzip
from pathlib import Path

import pytest

from reasonrec.data_gen.readers.steam import SteamReader
from reasonrec.tokenizers.errors import UserError

REVIEWS = """{u'username': u'Ann \\u2605', u'product_id': u'7', u'date': u'2017-12-17', u'text': u"It's ok"}
{u'username': u'bob', u'product_id': u'8', u'date': u'2017-12-18', u'text': u'', u'user_id': u'765'}
"""
GAMES = """{u'app_name': u'Seven', u'genres': [u'Indie', u'2D'], u'tags': [u'Short'], u'id': u'7', u'developer': u'Me'}
{u'title': u'Eight', u'app_name': u'8', u'publisher': u'You', u'id': u'8', u'price': u'Free'}
{u'title': u'Nine', u'id': u'9'}
"""


def folder_of(folder: Path, games: str = GAMES) -> str:
    (folder / "steam_reviews.json.gz").write_bytes(gzip.compress(REVIEWS.encode()))
    (folder / "steam_games.json.gz").write_bytes(gzip.compress(games.encode()))
    return str(folder)


def test_reviews_and_games(tmp_path: Path) -> None:
    log = SteamReader(path=folder_of(tmp_path), with_reviews=True).read_log()
    assert log.interactions.frame().rows() == [
        ("Ann ★", "7", 1_513_468_800_000, "It's ok"),
        ("bob", "8", 1_513_555_200_000, ""),
    ]
    assert log.items.rows() == [("7", "Seven", "Short", "Indie, 2D", "Me"), ("8", "Eight", "", "", "You")]
    assert not log.ordered


def test_a_game_without_an_id(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 of 4 lines .*line 4 \(no 'id'\)"):
        SteamReader(path=folder_of(tmp_path, GAMES + "{u'title': u'?'}\n")).read_log()
    log = SteamReader(path=str(tmp_path), max_bad_lines=0.25).read_log()
    assert log.interactions.frame().columns == ["user_id", "item_id", "timestamp"]
