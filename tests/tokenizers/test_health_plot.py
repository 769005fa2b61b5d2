import numpy as np
import pytest

from reasonrec.tokenizers.health import health_report
from reasonrec.tokenizers.health_plot import plot_report
from reasonrec.tokenizers.index import build_index

INDEX = build_index(np.array([[0, 0], [0, 0], [0, 1], [0, 1], [1, 0], [1, 2]]), [4, 3])


@pytest.fixture
def report():
    return health_report(INDEX, train_count=np.ones(6, int), category=["a", "a", "b", "b", "", ""], brand=[""] * 6)


@pytest.mark.parametrize("with_embeddings", [True, False])
@pytest.mark.parametrize("curves", [{}, {"step": [1, 2], "reconstruction": [1.0, 0.5], "commitment": [0.2, 0.1]}])
def test_the_plot_is_written(tmp_path, with_embeddings, curves, report):
    embeddings = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32) if with_embeddings else None
    figure = plot_report(report | {"training": curves}, INDEX, embeddings, "six items, $\\x$ \x1b")
    lines = [line.get_label() for ax in figure.axes for line in ax.get_lines()]
    assert ("commitment" in lines) == bool(curves)
    figure.savefig(tmp_path / "health.png", dpi=40)
    assert (tmp_path / "health.png").read_bytes().startswith(b"\x89PNG")


def test_panels_say_what_their_numbers_mean_and_count_in_whole_numbers(report):
    figure = plot_report(report, INDEX, None, "six items")
    figure.draw_without_rendering()
    usage, groups = figure.axes[:2]
    assert "change: items spread over level 0 as over 2 of its 4" not in usage.get_title()  # 1.9 of 4: acceptable
    assert usage.get_title().startswith("Items per code\nacceptable: ")
    assert "67% of the training targets" in groups.get_title().replace("\n", " ")
    assert all(float(tick).is_integer() for tick in groups.get_xticks())
