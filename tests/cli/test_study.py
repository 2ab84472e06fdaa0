"""A sweep from its command to its page: resumed, failing in part, on several launchers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from fusion.cli.main import main
from fusion.cli.sweep import already_finished
from fusion.config_folder import config_folder
from fusion.errors import UserError
from fusion.run_folder import save_report
from fusion.target import build

Sweep = Callable[..., int]
SMALL = ("modelpool=digits", "taskpool=digits", "taskpool.evaluate_members=false")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def sweep(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """Run a sweep of one-batch jobs in ``tmp_path / "out"``; return its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> int:
        given = [f"path.cache_dir={cache}", f"output_path={tmp_path / 'out'}", "fast_dev_run=true"]
        monkeypatch.setattr(sys, "argv", ["fusion_bench"])
        try:
            main(["-m", *SMALL, *arguments, *given])
        except SystemExit as left:
            return int(left.code or 0)
        return 0

    return run


def reports(folder: Path) -> dict[str, dict]:
    return {
        file.parent.name: json.loads(file.read_text()) for file in folder.glob("out/*/report.json")
    }


def accuracies(folder: Path) -> dict[str, object]:
    return {
        name: (report["evaluation"]["merged"], report["evaluation"].get("finetuned"))
        for name, report in reports(folder).items()
    }


def test_a_sweep_ends_in_a_page_and_resumes_what_is_missing(sweep: Sweep, tmp_path: Path) -> None:
    arguments = ("merge=base,lerp_10", "finetune=selective")
    assert sweep(*arguments) == 0
    out = tmp_path / "out"
    table = pd.read_csv(out / "study.csv")
    assert table["strategy"].tolist() == ["selective"] * 2
    assert table["algorithm"].tolist() == ["DummyAlgorithm", "SNRSelectiveMerge"]
    assert table["status"].eq("finished").all()
    assert "merge=base,lerp_10" in (out / "index.html").read_text()
    before = accuracies(tmp_path)
    assert len(before) == 2

    # Killed while the second job ran: no report, no page.
    cut = next(out.glob("1_*"))
    (cut / "report.json").unlink()
    (out / "index.html").unlink()
    times = {file: file.stat().st_mtime_ns for file in out.glob("*/report.json")}
    assert sweep(*arguments) == 0
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert accuracies(tmp_path) == before
    assert (out / "index.html").is_file()

    (out / "index.html").unlink()
    main([f"summarize={out}"])
    assert (out / "index.html").is_file()


@pytest.mark.slow
def test_a_benchmark_ends_in_a_page_of_its_own(cache: Path, tmp_path: Path) -> None:
    """The reports as real jobs write them: scores, controls and costs are all found."""
    out = tmp_path / "out"
    subprocess.run(
        [sys.executable, "-m", "fusion", "experiment=benchmark", "fast_dev_run=true",
         "benchmark.methods=[benchmark_controls,task_arithmetic]", "benchmark.seeds=[0]",
         "benchmark.settings=[digits_tasks_4]",
         f"path.cache_dir={cache}", f"output_path={out}"],
        check=True,
    )  # fmt: skip
    assert not (out / "study.csv").exists()
    table = pd.read_csv(out / "benchmark.csv").set_index(["method", "condition"])
    merges = table.loc["task_arithmetic"]
    assert {"merged", "chosen, recalibrate", "defaults, merge", "oracle head"} <= {*merges.index}
    assert merges[["score", "worst", "accuracy", "multiply_adds", "seconds"]].notna().all(axis=None)
    assert merges["needs"].eq("a pretrained model").all()
    experts = table.loc["benchmark_controls"].filter(like="expert: ", axis=0)
    assert experts["score"].eq(100).all()
    assert len(experts) == 4
    text = (out / "benchmark.md").read_text()
    assert "digits_tasks_4 (the simple average: " in text
    assert "| joint training |" in text
    assert "experiment=benchmark" in (out / "index.html").read_text()


def test_a_job_that_fails_fails_alone(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "from fusion import BaseAlgorithm\n"
        "class Broken(BaseAlgorithm):\n"
        "    def run(self, modelpool):\n"
        "        raise RuntimeError('the disk of <the> machine is full')\n"
    )
    assert sweep("method=custom", "method._target_=broken.Broken,fusion.method.DummyAlgorithm") == 1
    assert len(reports(tmp_path)) == 1
    record = json.loads(next(tmp_path.glob("out/0_*/error.json")).read_text())
    assert (record["kind"], record["mistake"]) == ("RuntimeError", False)
    assert "in run" in record["traceback"]
    assert "the disk of &lt;the&gt; machine" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.slow
def test_a_mistake_in_one_job_is_a_mistake(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("merge=lerp_10", "method.top_p=7,0.1") == 2
    assert len(reports(tmp_path)) == 1
    assert "top_p is 7" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out" / "study.csv")
    assert table["status"].tolist().count("failed") == 1


@pytest.mark.slow
def test_a_dry_sweep_leaves_nothing(sweep: Sweep, tmp_path: Path) -> None:
    assert sweep("merge=base,lerp_10", "dry_run=true") == 0
    assert not (tmp_path / "out").exists()


def test_only_the_same_configuration_counts_as_finished(tmp_path: Path) -> None:
    config = "seed: 0\nmethod:\n  top_p: 0.1\noverwrite: false\n"
    assert not already_finished(tmp_path, config, overwrite=False)
    save_report(tmp_path, {})
    (tmp_path / "config.yaml").write_text(config)
    assert already_finished(tmp_path, config, overwrite=False)
    assert not already_finished(tmp_path, config, overwrite=True)
    with pytest.raises(UserError, match="holds the report of a job with other options"):
        already_finished(tmp_path, config.replace("0.1", "0.2"), overwrite=False)


@pytest.mark.slow
def test_a_folder_that_was_moved_is_resumed_with_another_cache(
    sweep: Sweep, tmp_path: Path
) -> None:
    assert sweep("method=dummy", "seed=0,1") == 0
    first = reports(tmp_path)
    (tmp_path / "out").rename(tmp_path / "moved")
    given = ["-m", *SMALL, "method=dummy", "seed=0,1", "fast_dev_run=true"]
    places = [f"path.cache_dir={tmp_path / 'other'}", f"output_path={tmp_path / 'moved'}"]
    main([*given, *places])
    (tmp_path / "moved").rename(tmp_path / "out")
    assert reports(tmp_path) == first
    assert not (tmp_path / "other").exists()


def test_summarize_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["summarize=here", "seed=1"])
    assert left.value.code == 2
    assert "stands alone; leave seed=1 out" in capsys.readouterr().err


def test_every_merge_of_the_study_is_a_method() -> None:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        study = compose(
            "fusion_bench",
            ["experiment=snr_study", "modelpool=digits"],
            return_hydra_config=True,
        )
        assert study.hydra.runtime.choices.taskpool == "digits"
        axes = study.hydra.sweeper.params
        assert axes.finetune == "head,selective,full"
        merges = axes.merge.split(",")
        shipped = {file.stem for file in (config_folder() / "merge").glob("*.yaml")}
        assert set(merges) == shipped
        for merge in merges:
            overrides = ["experiment=snr_study", "modelpool=digits", f"merge={merge}"]
            method = compose("fusion_bench", overrides).method
            algorithm = build({**method, "seed": 0} if "seed" in method else {**method})
            if merge.partition("_")[0] in ("lerp", "slerp", "ties"):
                kind, share = merge.split("_")[:2]
                assert algorithm.interpolation == kind
                assert algorithm.top_p == int(share) / 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
        ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"),
    ],
    ids=["joblib", "submitit_local"],
)
def test_other_launchers_give_the_same_numbers(
    sweep: Sweep, tmp_path: Path, cache: Path, launcher: Sequence[str]
) -> None:
    arguments = ("merge=base,ties_10", "finetune=none,full")
    assert sweep(*arguments) == 0
    expected = accuracies(tmp_path)
    side = tmp_path / "side"
    side.mkdir()
    subprocess.run(
        [sys.executable, "-m", "fusion", "-m", *SMALL, *arguments, *launcher, "fast_dev_run=true",
         f"path.cache_dir={cache}", f"output_path={side / 'out'}"],
        check=True,
    )  # fmt: skip
    assert accuracies(side) == expected
    assert (side / "out" / "index.html").is_file()
