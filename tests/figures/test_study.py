"""What the figures of a study must show, read back from the drawing."""

from __future__ import annotations

import colorsys
import itertools
import math

import matplotlib.colors
import pandas as pd
import pytest

from fusion.figures.study_bars import study_bars
from fusion.figures.study_pareto import pareto_front, study_pareto
from fusion.figures.study_share import study_share
from fusion.figures.study_style import FINETUNINGS, finetuning_style, interpolation_styles


@pytest.fixture
def table() -> pd.DataFrame:
    rows = [
        ("base", "full", None, math.nan, 0.87, 0.95, 4.0, "usual"),
        ("LERP 10 %", "head", "lerp", 0.1, 0.92, 0.93, 1.0, "usual"),
        ("LERP 10 %", "full", "lerp", 0.1, 0.92, 0.95, 3.9, "usual"),
        ("LERP 100 %", "head", "lerp", 1.0, 0.94, 0.96, 1.1, "usual"),
        ("TIES 10 %", "head", "ties", 0.1, 0.80, 0.90, 1.2, "usual"),
        ("LERP 10 %, at random", "head", "lerp", 0.1, 0.91, 0.92, 1.3, "random"),
        ("LERP 10 %, equal", "head", "lerp", 0.1, 0.90, 0.91, 1.4, "other"),
    ]
    columns = ["name", "strategy", "interpolation", "share", "merged_accuracy",
               "finetuned_accuracy", "training_seconds", "series"]  # fmt: skip
    found = pd.DataFrame(rows, columns=columns)
    errors = {f"{name}_error": math.nan for name in columns[4:7]}
    return found.assign(**errors)


def test_every_bar_has_its_value_and_begins_at_zero(table: pd.DataFrame) -> None:
    axes = study_bars(
        table, "finetuned_accuracy", label="accuracy (%)", scale=100, baseline=0.95
    ).axes[0]
    assert [bar.get_x() for bar in axes.patches] == [0] * len(table)
    drawn = sorted(bar.get_width() for bar in axes.patches)
    assert drawn == pytest.approx(sorted(100 * table["finetuned_accuracy"]))
    assert sorted(float(text.get_text()) for text in axes.texts) == pytest.approx(drawn)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(
        dict.fromkeys(table["name"])
    )
    assert any(list(line.get_xdata()) == [95.0, 95.0] for line in axes.lines)


def test_bars_of_seeds_show_the_error(table: pd.DataFrame) -> None:
    axes = study_bars(
        table.assign(training_seconds_error=0.25), "training_seconds", label="s", digits=2
    ).axes[0]
    assert "4.00 ± 0.25" in [text.get_text() for text in axes.texts]


def test_a_loss_is_drawn_to_the_left(table: pd.DataFrame) -> None:
    changes = table.assign(change=[0.0, -0.02, 0.0, 0.01, -0.05, -0.03, -0.0001])
    axes = study_bars(changes, "change", label="points", scale=100).axes[0]
    low, high = axes.get_xlim()
    assert low < -5 < 1 < high
    assert "−0.0" not in [text.get_text() for text in axes.texts]


def test_lines_join_what_differs_in_share_alone(table: pd.DataFrame) -> None:
    axes = study_share(table, control=0.9, baseline=0.95).axes[0]
    lines = {c.get_label(): c.lines[0] for c in axes.containers}
    assert list(lines["LERP"].get_xdata()) == [10.0, 100.0]
    assert list(lines["LERP"].get_ydata()) == pytest.approx([92.0, 94.0])
    assert list(lines["layers drawn at random"].get_ydata()) == pytest.approx([91.0])
    assert lines["LERP 10 %, equal"].get_linestyle() == "None"
    assert any(list(line.get_ydata()) == [90.0, 90.0] for line in axes.lines)


def test_no_point_beats_the_front() -> None:
    seconds = pd.Series([3.0, 1.0, 2.0, 1.0, 5.0])
    accuracy = pd.Series([0.9, 0.8, 0.7, 0.85, 0.9])
    front = pareto_front(seconds, accuracy)
    assert front == [3, 0]
    for i, j in itertools.product(front, range(5)):
        assert not (seconds[j] < seconds[i] and accuracy[j] >= accuracy[i])


def test_the_front_is_named(table: pd.DataFrame) -> None:
    axes = study_pareto(table).axes[0]
    told = axes.texts[-1].get_text().split("\n")
    assert told == ["1  LERP 10 %; the head trained", "2  LERP 100 %; the head trained"]


def test_nothing_to_draw_is_an_error(table: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="no row"):
        study_bars(table.assign(x=math.nan), "x", label="x")
    with pytest.raises(ValueError, match="no row"):
        study_share(table.assign(share=math.nan))
    with pytest.raises(ValueError, match="no row"):
        study_pareto(table.assign(training_seconds=math.nan))


def test_fine_tunings_keep_their_order_in_greyscale() -> None:
    lightness = [
        colorsys.rgb_to_hls(*matplotlib.colors.to_rgb(color))[1]
        for color, _ in FINETUNINGS.values()
    ]
    assert all(light - dark > 0.12 for light, dark in itertools.pairwise(lightness))


def test_one_colour_means_one_thing() -> None:
    colours = [style.color for style in interpolation_styles(["lerp", "slerp", "ties"]).values()]
    colours += [finetuning_style(name)[0] for name in FINETUNINGS]
    assert len(set(colours)) == len(colours)
    # Which others take part changes nothing.
    assert interpolation_styles(["ties"])["ties"] == interpolation_styles(["lerp", "ties"])["ties"]
