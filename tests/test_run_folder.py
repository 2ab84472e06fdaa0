from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from fusion.errors import UserError
from fusion.modelpool import BaseModelPool
from fusion.run_folder import RunFolder
from fusion.weights import read_metadata


def test_everything_lands_in_the_folder(base, tmp_path, caplog) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.check()
    folder.save_config("seed: 0\n")
    folder.save_model(base, BaseModelPool([base]), {"method": "mine"})
    folder.save_report({"number": np.float32(0.5), "tensor": torch.tensor(2), "path": tmp_path})
    with caplog.at_level(logging.INFO, "fusion"):
        folder.tell()
    assert "config.yaml, merged.safetensors, report.json" in caplog.text
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report == {"number": 0.5, "tensor": 2, "path": str(tmp_path)}
    provenance = read_metadata(tmp_path / "run" / "merged.safetensors")["provenance"]
    assert json.loads(provenance) == {"method": "mine"}


def test_the_report_and_the_model_can_go_elsewhere(base, tmp_path, caplog) -> None:
    folder = RunFolder(
        tmp_path / "run",
        report_path=tmp_path / "r" / "r.json",
        model_path=tmp_path / "m" / "m.safetensors",
    )
    folder.check()
    assert list(tmp_path.iterdir()) == []  # a check makes nothing
    folder.clear()
    folder.save_model(base, BaseModelPool([base]), {})
    folder.save_report({})
    with caplog.at_level(logging.INFO, "fusion"):
        folder.tell()
    assert list((tmp_path / "run").iterdir()) == []
    assert "r.json" in caplog.text
    assert "m.safetensors" in caplog.text


def test_a_finished_run_is_not_lost(tmp_path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(UserError, match=r"report.json' is there already.*overwrite=true"):
        RunFolder(tmp_path).check()
    replacing = RunFolder(tmp_path, overwrite=True)
    replacing.check()
    assert (tmp_path / "report.json").exists()  # a check changes nothing
    replacing.clear()
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"path": "/proc/x"}, "output_path: cannot write to the folder '/proc/x'"),
        ({"path": "p", "report_path": "/proc/x/r.json"}, "report_save_path: cannot write"),
        ({"path": "p", "model_path": "m.pt"}, "'m.pt' must end in .safetensors"),
        ({"path": "p", "report_path": "."}, "is a folder; give the name of a file"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_work(
    tmp_path, monkeypatch, options, said
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        RunFolder(**options).check()


def test_a_report_holds_plain_values_only() -> None:
    with pytest.raises(TypeError, match="plain values, not object"):
        RunFolder(Path("unused")).save_report({"x": object()})
