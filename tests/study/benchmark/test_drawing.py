"""What the benchmark's figures show of the runs."""

from __future__ import annotations

from fusion.study.benchmark.drawing import drawings

from .conftest import Sweep, small_benchmark


def test_figures_of_cost_keep_every_treatment_where_a_setting_has_no_batch_norm(
    sweep: Sweep,
) -> None:
    small_benchmark(sweep, settings=("a", "b"), seeds=2)
    for seed in range(2):
        sweep.controls(seed, {}, setting="norm_free")
        for method in ("simple_average", "task_arithmetic", "ties_merging", "regmean"):
            sweep.methods(method, seed, {"defaults, pretrained": 0.9}, setting="norm_free")
    found = {drawing.stem: drawing for drawing in drawings(sweep.measured())}
    for name in ("benchmark_multiply_adds", "benchmark_data"):
        assert "in the mean of 2 settings with batch norm" in found[name].caption
        entries = {
            text.get_text() for legend in found[name].figure.legends for text in legend.get_texts()
        }
        assert {"defaults, batch norm merged", "defaults, batch norm per task", "chosen"} <= entries


def test_without_any_batch_norm_the_figures_of_cost_show_all_settings(sweep: Sweep) -> None:
    for setting in ("a", "b"):
        sweep.controls(0, {}, setting=setting)
        for method in ("simple_average", "ties_merging"):
            sweep.methods(method, 0, {"defaults, pretrained": 0.9}, setting=setting)
    found = {drawing.stem: drawing for drawing in drawings(sweep.measured())}
    assert "in the mean of 2 settings against" in found["benchmark_data"].caption


def test_the_figures_of_cost_wait_for_no_setting_without_scores(sweep: Sweep) -> None:
    sweep.controls(0, {}, setting="norm_free")
    for setting, treatment in {"norm_free": "pretrained", "without_controls": "merge"}.items():
        for method in ("simple_average", "ties_merging"):
            sweep.methods(method, 0, {f"defaults, {treatment}": 0.9}, setting=setting)
    found = {drawing.stem: drawing for drawing in drawings(sweep.measured())}
    assert "on norm_free against" in found["benchmark_data"].caption
