from __future__ import annotations

import io
import math

import pandas as pd
import pytest

from .conftest import IMAGES, Sweep


def test_a_score_is_a_mean_of_shares_of_the_experts_of_its_seed(sweep: Sweep) -> None:
    sweep.controls(0, {})
    sweep.methods("regmean", 0, {"merged": 0.9, "defaults, merge": 0.8})
    sweep.methods("regmean", 1, {"merged": 0.9})
    rows = sweep.measured().methods.set_index(["seed", "condition"])
    shares = [100 * 0.9 / 0.95, 100 * 0.8 / 0.85]
    first = rows.loc[0, "merged"]
    assert first["score"] == pytest.approx(sum(shares) / 2)
    assert first["worst"] == pytest.approx(min(shares))
    assert first["accuracy"] == pytest.approx(0.85)
    errors = [100 * math.sqrt(a * (1 - a) / IMAGES) / e for a, e in ((0.9, 0.95), (0.8, 0.85))]
    assert first["test_error"] == pytest.approx(sum(errors) / 2)
    # No controls of the second seed yet: its accuracy is known, its score is not.
    assert math.isnan(rows.loc[1, "merged"]["score"])
    assert rows.loc[1, "merged"]["accuracy"] == pytest.approx(0.85)


def test_what_a_condition_needs_and_looks_at_are_two_things(sweep: Sweep) -> None:
    conditions = dict.fromkeys(
        ["merged", "defaults, merge", "chosen, recalibrate", "oracle head"], 0.8
    )
    sweep.methods("simple_average", 0, conditions)
    sweep.methods("adamerging", 0, conditions)
    rows = sweep.measured().conditions.set_index(["method", "condition"])
    assert rows.loc["simple_average", "data"].to_dict() == {
        "merged": "images",
        "defaults, merge": "no data",
        "chosen, recalibrate": "labels",
        "oracle head": "labels",
    }
    assert set(rows.loc["simple_average", "group"]) == {"nothing"}
    assert rows.loc[("adamerging", "defaults, merge"), "data"] == "images"
    assert set(rows.loc["adamerging", "group"]) == {"gradients"}
    assert rows.loc[("adamerging", "merged"), "needs"] == (
        "a pretrained model, images without labels, gradients"
    )


def test_the_joint_question_is_no_task(sweep: Sweep) -> None:
    sweep.controls(0, {}, joint={"ensemble": 0.7, "merged": 0.6})
    rows = sweep.measured().conditions.set_index("condition")
    assert rows.loc["merged", "joint"] == 0.6
    assert rows.loc["merged", "accuracy"] == pytest.approx(0.75)
    assert rows.loc["ensemble", "joint"] == 0.7
    assert math.isnan(rows.loc["ensemble", "score"])


def test_a_network_that_answers_one_of_two_tasks_has_no_score(sweep: Sweep) -> None:
    import json

    sweep.controls(0, {})
    sweep.methods("slerp", 0, {"merged": 0.9})
    file = sweep.folder / "a" / "slerp" / "seed_0" / "report.json"
    report = json.loads(file.read_text())
    del report["evaluation"]["merged"]["digits"]
    file.write_text(json.dumps(report))
    rows = sweep.measured().methods
    assert math.isnan(rows["score"].iloc[0])
    assert math.isnan(rows["accuracy"].iloc[0])


def test_a_task_without_an_expert_counts_in_no_score(sweep: Sweep) -> None:
    import json

    sweep.controls(0, {})
    sweep.methods("slerp", 0, {"merged": 0.9})
    before = sweep.measured().methods["score"].iloc[0]
    file = sweep.folder / "a" / "slerp" / "seed_0" / "report.json"
    report = json.loads(file.read_text())
    report["evaluation"]["merged"]["everything"] = {"accuracy": 0.1, "images": 100}
    file.write_text(json.dumps(report))
    assert sweep.measured().methods["score"].iloc[0] == before


def test_the_csv_has_a_row_per_condition_and_a_column_per_task(sweep: Sweep) -> None:
    sweep.controls(0, {"base": 0.5})
    sweep.methods("slerp", 0, {"merged": 0.9, "defaults, merge": 0.8}, setting="b")
    table = pd.read_csv(io.StringIO(sweep.measured().csv()))
    found = table.set_index(["setting", "method", "condition"])
    assert len(table) == 6  # merged, base, two experts; two of slerp
    assert found.loc[("b", "slerp", "defaults, merge"), "accuracy: letters"] == 0.8
    assert found.loc[("a", "benchmark_controls", "base"), "score"] == pytest.approx(
        100 * (0.5 / 0.95 + 0.4 / 0.85) / 2
    )


def test_a_job_that_is_run_again_leaves_the_order_of_the_settings(sweep: Sweep) -> None:
    sweep.methods("zipit", 0, {"merged": 0.7}, setting="last")  # number 0 of a later, shorter list
    for setting in ("first", "last"):
        sweep.controls(0, {}, setting=setting)
        sweep.methods("slerp", 0, {"merged": 0.8}, setting=setting)
    assert sweep.measured().settings == ["first", "last"]
