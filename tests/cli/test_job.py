from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from fusion.cli.job import job_folder, remove_empty
from fusion.modelpool import BaseModelPool, Checkpoint
from fusion.taskpool import ClassificationTaskPool
from fusion.weights import read_metadata

SNR = "method=snr_selective_merge"
TRIAL = ("modelpool=digits", "taskpool=digits", "fast_dev_run=true")
MEMBERS = ["_pretrained_", "expert_a", "expert_b"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache, command_in) -> tuple[Any, Path]:
    """The main command as a stranger types it, on one batch and one epoch."""
    cwd = tmp_path_factory.mktemp("cwd")
    answer = command_in(SNR, *TRIAL, "method.head=union", cwd=cwd, FUSION_CACHE=str(cache))
    assert answer.code == 0, answer.err
    (folder,) = cwd.glob("outputs/snr_selective_merge/digits/*")
    return answer, folder


def test_the_command_leaves_a_whole_folder(run) -> None:
    answer, folder = run
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml", "layers.csv", "layers.pdf", "layers.png", "merged.safetensors", "report.json"
    }  # fmt: skip
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert "Saved in" in answer.out
    assert "Accuracy (%)" in answer.out


def test_the_report_sets_everything_side_by_side(run) -> None:
    _, folder = run
    report = json.loads((folder / "report.json").read_text())
    evaluation = report["evaluation"]
    control = "_pretrained_, batch norm recalibrated"
    assert list(evaluation) == [*MEMBERS, "ensemble", control, "merged"]
    assert set(evaluation["merged"]) == {"digits", "classes 0-3", "classes 4-9"}
    assert set(evaluation["expert_a"]) == {"classes 0-3"}
    assert set(evaluation["expert_b"]) == {"classes 4-9"}
    assert set(evaluation["merged"]["digits"]["class_accuracy"]) == set("0123456789")
    for metric in ("accuracy", "f1", "loss", "images"):
        assert isinstance(evaluation["merged"]["digits"][metric], float | int)
    assert report["models"] == MEMBERS
    assert report["choices"]["method"] == "snr_selective_merge"
    assert report["choices"]["overrides"] == [SNR, *TRIAL, "method.head=union"]
    assert report["algorithm"]["batch_norm"] == "recalibrate"
    assert report["timings"]["run"]["calls"] == 1
    assert report["seed"] == 0
    table = pd.read_csv(folder / "layers.csv")
    chosen = table.loc[table["selected"], "layer"].tolist()
    assert chosen == report["algorithm"]["selected_layers"] != []


def test_the_model_needs_nothing_but_its_file(run) -> None:
    _, folder = run
    pool = BaseModelPool({"merged": Checkpoint(folder / "merged.safetensors")})
    model = pool.load_model("merged")
    assert type(model).__name__ == "SeparableResNet"
    tasks = ClassificationTaskPool(
        {"digits": {"_target_": "fusion.data.digits", "split": "test"}}, fast_dev_run=True
    )
    found = tasks.evaluate(model, labels=pool.labels("merged"))["digits"]
    report = json.loads((folder / "report.json").read_text())
    assert found["accuracy"] == report["evaluation"]["merged"]["digits"]["accuracy"]
    provenance = json.loads(read_metadata(folder / "merged.safetensors")["provenance"])
    assert provenance["models"] == MEMBERS
    assert provenance["seed"] == 0


def test_the_configuration_is_kept_resolved(run) -> None:
    _, folder = run
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["output_path"] == str(folder)
    assert config["method"]["head"] == "union"
    assert config["modelpool"]["models"]["expert_a"]["seed"] == 0
    assert "${" not in (folder / "config.yaml").read_text()


@pytest.mark.slow
def test_the_second_run_finds_the_members_in_the_cache(run, main_in, tmp_path, capsys) -> None:
    main_in(SNR, *TRIAL, "method.head=union", "method.plot=false", "output_path=again")
    out = capsys.readouterr().out
    assert "training for" not in out
    assert out.count("found in the cache") == len(MEMBERS)
    _, folder = run
    first, second = (
        Checkpoint(where / "merged.safetensors").build().state_dict()
        for where in (folder, tmp_path / "again")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_without_a_task_pool_nothing_is_measured(main_in, tmp_path) -> None:
    main_in("modelpool=digits", "taskpool=null", "fast_dev_run=true", "output_path=run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["evaluation"] == {}
    assert report["method"] == "DummyAlgorithm"


def test_a_finished_run_is_replaced_only_when_asked(main_in, tmp_path, capsys) -> None:
    arguments = ("modelpool=digits", "fast_dev_run=true", "output_path=run")
    main_in(*arguments)
    before = (tmp_path / "run" / "report.json").read_text()
    with pytest.raises(SystemExit):
        main_in(*arguments)
    assert "holds a finished run" in capsys.readouterr().err
    assert (tmp_path / "run" / "report.json").read_text() == before
    main_in(*arguments, "overwrite=true", "seed=3")
    assert json.loads((tmp_path / "run" / "report.json").read_text())["seed"] == 3


def test_the_tables_of_a_method_do_not_go_into_another_run(main_in, tmp_path, capsys) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.json").write_text("{}")
    with pytest.raises(SystemExit):
        main_in("modelpool=digits", "method=task_vector_cos_similarity", "method.output_path=old")
    assert "method.output_path: 'old' holds another run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["report.json"]


def test_the_report_and_the_model_can_go_elsewhere(main_in, tmp_path) -> None:
    where = ("report_save_path=r/r.json", "merged_model_save_path=m/m.safetensors")
    main_in("modelpool=digits", "fast_dev_run=true", "output_path=run", *where)
    assert (tmp_path / "r" / "r.json").is_file()
    assert (tmp_path / "m" / "m.safetensors").is_file()
    assert not list((tmp_path / "run").glob("*.json"))


def test_a_dry_run_checks_and_leaves_nothing(main_in, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("FUSION_CACHE", str(tmp_path / "cache"))
    main_in(SNR, "modelpool=digits", "taskpool=digits", "dry_run=true")
    assert "everything checked is in order" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_configuration_is_printed_when_asked(main_in, capsys) -> None:
    main_in("modelpool=digits", "dry_run=true", "print_config=true")
    assert "_target_: fusion.modelpool.BaseModelPool" in capsys.readouterr().out


@pytest.mark.filterwarnings("error:Experiment logs")
def test_metrics_go_to_a_logger_when_chosen(main_in, tmp_path) -> None:
    main_in(*TRIAL, "fabric=cpu", "fabric/loggers=csv", "output_path=run")
    metrics = pd.read_csv(tmp_path / "run" / "logs" / "metrics.csv")
    assert "merged/digits/accuracy" in metrics


MINE = """
import os, time
from fusion import BaseAlgorithm

class Mine(BaseAlgorithm):
    def __init__(self, *, k):
        self.k = k

    def run(self, modelpool):
        self.report["k"], self.report["process"] = self.k, os.getpid()
        return modelpool.load_pretrained_model()
"""


@pytest.mark.slow
def test_side_by_side_jobs_run_a_class_of_the_current_folder(tmp_path, cache, command_in) -> None:
    """`hydra/launcher=joblib`: two workers, three jobs, a folder each, named by its overrides."""
    (tmp_path / "my_module.py").write_text(MINE)
    answer = command_in(
        "-m", "method=custom", "method._target_=my_module.Mine", "+method.k=1,7,'a/b: c'",
        "modelpool=digits", "fast_dev_run=true", "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2", "hydra.verbose=false", cwd=tmp_path, FUSION_CACHE=str(cache),
    )  # fmt: skip
    assert answer.code == 0, answer.err
    reports = {
        path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("report.json")
    }
    assert len(reports) == 3
    assert {report["algorithm"]["k"] for report in reports.values()} == {1, 7, "a/b: c"}
    for name, report in reports.items():
        if isinstance(report["algorithm"]["k"], int):
            assert f"method.k={report['algorithm']['k']}" in name
    assert len({path.parent.parent for path in tmp_path.rglob("report.json")}) == 1


def test_the_jobs_folders_differ_whatever_is_varied() -> None:
    long = [f"method.rank_by=[{','.join(f'layer{i}' for i in range(99))},{last}]" for last in "xy"]
    overrides = [["seed=1"], ["seed=2"], ["seed=1"], [], [], [long[0]], [long[1]]]
    names = [job_folder(number, given) for number, given in enumerate(overrides)]
    assert len(set(names)) == len(names)
    assert names[0] == "0_seed=1"
    assert names[3] == "3"
    assert all(len(name.encode()) < 255 and "/" not in name for name in names)
    assert job_folder(0, [long[0]]) != job_folder(0, [long[1]])


def test_only_empty_folders_below_the_root_are_removed(tmp_path) -> None:
    full, empty = tmp_path / "root" / "a" / "full", tmp_path / "root" / "b" / "empty"
    for folder in (full, empty):
        folder.mkdir(parents=True)
    (full / "file").touch()
    remove_empty(full, below=tmp_path / "root")
    remove_empty(empty, below=tmp_path / "root")
    assert full.is_dir()
    assert not empty.parent.exists()
    remove_empty(tmp_path / "root" / "a", below=tmp_path / "elsewhere")
    assert full.is_dir()
