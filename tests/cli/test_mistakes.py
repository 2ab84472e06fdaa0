from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import yaml

DIGITS = "modelpool=digits"
SNR = "method=snr_selective_merge"
LONG = "a" * 300


MISTAKES = [
    ("metod=dummy modelpool=digits", "no option 'metod'; did you mean 'method'?"),
    (f"{DIGITS} sed=3", "no option 'sed'; did you mean 'seed'?"),
    (f"{DIGITS} {SNR} method.topp=0.2", "method has no option 'topp'; did you mean 'top_p'?"),
    (
        f"{DIGITS} modelpool.models.expert_c.seed=1",
        "modelpool.models has no option 'expert_c'; did you mean 'expert_",
    ),
    (f"{DIGITS} fabric.zzz=cpu", "fabric has no option 'zzz'; it has "),
    (f"{DIGITS} hydra.job.nam=x", "hydra.job has no option 'nam'; did you mean 'name'?"),
    ("modelpool=digit", "no such modelpool; did you mean 'digits'?"),
    (f"{DIGITS} method=snr_selective_marge", "did you mean 'snr_selective_merge'?"),
    (f"{DIGITS} fabric/loggers=cs", "did you mean 'csv'?"),
    (f"{DIGITS} fabric/logger=csv", "did you mean 'fabric/loggers'?"),
    (f"{DIGITS} hydra/launcher=jobib", "did you mean 'joblib'?"),
    (f"{DIGITS} --multirn", "did you mean '--multirun'?"),
    (f"{DIGITS} --cfg jb", "invalid choice: 'jb'"),
    ("method=dummy", "choose a modelpool: modelpool=NAME, one of "),
    ("method=dummy modelpool.lr=1", "choose a modelpool: modelpool=NAME, one of "),
    ("experiment=benchmark cache_dir=x", "no option 'cache_dir'; here it is path.cache_dir=VALUE"),
    ("modelpool=null", "modelpool=null: a run needs a modelpool"),
    (f"{DIGITS} method=null", "a run needs a method; method=dummy merges nothing"),
    (f"{DIGITS} ~method", "a run needs a method"),
    (f"{DIGITS} seed=abc", "seed is 'abc'; give a whole number of 0 or more"),
    (f"{DIGITS} fast_dev_run=1", "fast_dev_run is 1; give true or false"),
    (f"{DIGITS} method=custom", "method._target_ has no value; give it as method._target_="),
    (f"{DIGITS} seed=1,2", "to run a job for each, add --multirun"),
    (f"{DIGITS} foo", "the argument 'foo' cannot be read; options are given as name=value"),
    (f"{DIGITS} a=b=c", "the argument 'a=b=c' cannot be read"),
    (f"{DIGITS} method=slerp method.seed=${{seed}} sed=1", "did you mean 'seed'"),
    (f"{DIGITS} method=ties", "there is no such method; did you mean 'ties_merging'?"),
    (f"{DIGITS} method=average", "did you mean 'simple_average'?"),
    (f"{DIGITS} method=rebasin", "did you mean 'git_rebasin'?"),
    (f"{DIGITS} method=3", "method is 3; give the name of one (there are adamerging,"),
    (f"{DIGITS} method=[a]", "method is ['a']; give the name of one"),
    (f"{DIGITS} method=", "method is ''; give the name of one"),
    (f"{DIGITS} fabric=null", "fabric=null: a run needs a fabric; fabric=auto takes the best"),
    (f"{DIGITS} fabric/loggers=true", "fabric/loggers is true; give the name of one"),
    (
        f"{DIGITS} method=ties_merging method.density=0.3",
        "method has no option 'density'; here it is method.rule.density=VALUE",
    ),
    (
        f"{DIGITS} method=ties_merging method.scaling_factor=0.3",
        "method has no option 'scaling_factor'; here it is method.rule.scale=VALUE",
    ),
    (
        f"{DIGITS} method=ties_merging method.threshold=20",
        "method has no option 'threshold'; here it is method.rule.density=VALUE",
    ),
    (f"{DIGITS} method=slerp method.weight=1", "here it is method.weights=VALUE"),
    (f"{DIGITS} method=ties_merging density=0.3", "here it is method.rule.density=VALUE"),
    (
        f"{DIGITS} modelpool.models.expert_a.dataset.split=test",
        "expert_a.dataset is the same as modelpool.train_datasets._pretrained_",
    ),
    (
        f"{DIGITS} +modelpool.models.expert_a.dataset.channels=3",
        "set modelpool.train_datasets._pretrained_.channels=VALUE for both, or give the whole",
    ),
    (f"{DIGITS} seed=-1", "seed is -1; give a whole number of 0 or more"),
    (f"{DIGITS} seed=9223372036854775808", "give a whole number from 0 to 9223372036854775807"),
    (f"{DIGITS} seed=1{'0' * 5000}", "the number has too many digits; give a smaller one"),
    (f"{DIGITS} report_save_path=3", "report_save_path is 3; give a path that is not empty"),
    (f"{DIGITS} output_path=null", "output_path cannot be used in hydra.run.dir (Incompatible"),
    (f"{DIGITS} path.data_dir=", "path.data_dir is ''; give a path that is not empty"),
    (
        f"{DIGITS} hydra.output_subdir=x",
        "the program writes the run folder itself; leave that out",
    ),
    (f"{DIGITS} hydra.job_logging.root.level=x", "hydra.job_logging or hydra.hydra_logging: "),
    (f"{DIGITS} hydra.callbacks.summarise=3", "hydra.callbacks: Cannot instantiate config of"),
    (f"{DIGITS} method.seed=${{nowhere}} method=slerp", "refers to '${nowhere}', which the"),
    (f"{DIGITS} -cn foo", "--config-name: there is no configuration 'foo'"),
    (f"{DIGITS} --config-dir nowhere", "nowhere' not found"),
    (f"{DIGITS} output_path={LONG}", "aaa…': File name too long; choose a shorter name"),
    (f"summarize={LONG}", "aaa…': File name too long; choose a shorter name"),
    (f"{DIGITS} output_path=/proc/nowhere", "output_path: cannot make the run folder"),
    ("-m seed=1,2 modelpool=digits report_save_path=r.json", "would overwrite each other's"),
    ("-m seed=1,2 modelpool=digits merged_model_save_path=m.safetensors", "overwrite each"),
]
# All mistakes are made in one process, which then shows what none of them imported.
MAKE_THEM = """
import contextlib, io, json, os, pathlib, sys
from hydra.core.global_hydra import GlobalHydra
from fusion.cli import main

answers, start = [], os.getcwd()
for number, arguments in enumerate(json.load(sys.stdin)):
    folder = pathlib.Path(start, str(number))
    folder.mkdir()
    os.chdir(folder)
    GlobalHydra.instance().clear()
    sys.stderr = err = io.StringIO()
    code = 0
    try:
        main(arguments.split())
    except SystemExit as left:
        code = left.code
    sys.stderr = sys.__stderr__
    files = [str(path) for path in folder.rglob("*") if path.is_file()]
    heavy = sorted({"torch", "lightning", "fusion.program"} & set(sys.modules))
    answers.append({"code": code, "err": err.getvalue(), "files": files, "heavy": heavy})
pathlib.Path(start, "answers.json").write_text(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mistakes")
    typed = json.dumps([arguments for arguments, _ in MISTAKES])
    subprocess.run(
        [sys.executable, "-c", MAKE_THEM], input=typed, text=True, cwd=folder, check=True
    )
    found: list[dict[str, Any]] = json.loads((folder / "answers.json").read_text())
    return found


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[typed[:80] for typed, _ in MISTAKES])
def test_a_mistake_is_told_in_a_sentence_before_torch(answers, number) -> None:
    (typed, said), answer = MISTAKES[number], answers[number]
    assert answer["code"] == 2
    assert answer["heavy"] == []
    last = answer["err"].rstrip("\n").splitlines()[-1]
    assert last.startswith("fusion_bench: error: ")
    assert said in last
    assert "Traceback" not in answer["err"]
    if "-m" not in typed.split():  # a sweep leaves its list of jobs
        assert answer["err"].count("\n") == 1
        assert answer["files"] == []


def test_a_mistake_costs_no_torch(command) -> None:
    answer = command("modelpool=digits", "method=ties")
    assert answer.code == 2
    assert answer.imported  # the trace works
    assert not {"torch", "lightning", "fusion.program"} & answer.imported


@pytest.mark.parametrize(
    "arguments",
    [
        f"{DIGITS} seed=1e9",
        f"{DIGITS} taskpool=null merge=null experiment=null finetune=null fabric/loggers=null",
        f"{DIGITS} fabric.devices=auto fabric.accelerator=cpu",
        f"{DIGITS} fabric.devices='1'",
        "-m modelpool=digits seed=1,2",
        pytest.param("modelpool=digits -m seed=1,2", marks=pytest.mark.slow),
        pytest.param("modelpool=digits seed=1,2 --multirun method=slerp", marks=pytest.mark.slow),
        "method=slerp modelpool=digits -m seed=1,2 hydra.verbose=false",
    ],
)
def test_what_means_something_is_not_refused(main_in, capsys, arguments) -> None:
    main_in(*arguments.split(), "dry_run=true")
    jobs = 2 if "-m" in arguments else 1
    assert capsys.readouterr().out.count("everything checked is in order") == jobs


def test_the_traceback_is_there_for_whoever_asks(command) -> None:
    answer = command("modelpool=digit", FUSION_DEBUG="1")
    assert answer.code != 0
    assert "Traceback (most recent call last)" in answer.err
    assert "did you mean 'digits'" in answer.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([SNR, "method.top_p=abc"], "top_p is 'abc'; give a number from 0 to 1"),
        ([SNR, "method.top_p=2"], "top_p is 2; give a number from 0 to 1"),
        ([SNR, "method.rank_by=expert"], "did you mean 'experts'"),
        (["+method.k=3"], "fusion.method.DummyAlgorithm has no option 'k'"),
        (["method=custom", "method._target_=nowhere.Mine"], "there is no module 'nowhere'"),
        (["fabric.devices=77"], "Lightning Fabric refuses fabric.accelerator"),
        (["fabric.accelerator=cpu", "fabric.devices=[0]"], "Lightning Fabric refuses fabric.acc"),
        (["fabric.accelerator=cpu", "fabric.devices=0"], "Lightning Fabric refuses fabric.acc"),
        (["fabric.precision=16x"], "Fabric.precision is '16x'; give "),
        (["+fabric.num_nodes=2"], "fabric.num_nodes=2: there is no sign of a cluster"),
        (["fabric.loggers=3"], "fabric.loggers is 3; give a mapping with _target_, or null"),
        (["fabric/loggers=csv", "fabric.loggers.name=3"], "CSVLogger.name is 3; give text"),
        (["method=slerp", "method.weights=3"], "Merge.weights is 3; give a list of numbers, a map"),
        (["method=slerp", "method.weights=[1,x]"], "Merge.weights[1] is 'x'; give a number"),
        (["method=slerp", "method.rule=3"], "Merge.rule is 3; give a Rule, or a mapping with"),
        (["modelpool.models.expert_a.epochs=1e3"], "epochs is 1000.0; give a whole number of 1"),
        (
            ["modelpool.models._pretrained_.accelerator=gpu"],
            "Lightning Fabric refuses accelerator=gpu",
        ),
        (["modelpool.models.expert_a.classes=[]"], "TrainedModel.classes is []; give a non-empty"),
        ([f"report_save_path={LONG}.json"], "File name too long; choose a shorter name"),
        ([f"path.cache_dir={LONG}"], "File name too long; choose a shorter name"),
        (["merged_model_save_path=m.pt"], "must end in .safetensors"),
        (["+modelpool.train_datasets._pretrained_.splt=x"], "did you mean 'split'"),
    ],
)
def test_what_only_the_program_can_find_is_told_alike(
    main_in, tmp_path, capsys, arguments, said
) -> None:
    if "77" in arguments[0]:
        arguments = [*arguments, "fabric.accelerator=gpu"]
    if "gpu" in arguments[0] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    arguments = ["+" + a if a.startswith("modelpool") and "acc" in a else a for a in arguments]
    with pytest.raises(SystemExit) as left:
        main_in(DIGITS, *arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_sentence(main_in, monkeypatch, capsys) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/report.json")

    monkeypatch.setattr("fusion.program.save_report", full)
    with pytest.raises(SystemExit) as left:
        main_in(DIGITS, "fast_dev_run=true", "output_path=run")
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert "'run/report.json': No space left on device; make room, or choose a folder" in err
    assert "Traceback" not in err


def test_a_logger_whose_extra_is_missing_is_told_before_any_work(
    main_in, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("fusion.training.devices.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as left:
        main_in(DIGITS, "fabric/loggers=tensorboard")
    assert left.value.code == 2
    assert "needs tensorboard (pip install 'fusion-cnn[tensorboard]')" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_expert_of_the_template_has_its_own_number_of_classes(main_in, capsys) -> None:
    main_in(
        "modelpool=torchvision",
        "path.checkpoint=base.pt",
        *(f"modelpool.models.expert_{name}.path={name}.pt" for name in "ab"),
        "modelpool.models.expert_a.architecture.num_classes=5",
        *("--cfg", "job", "--resolve"),
    )
    shown = yaml.safe_load(capsys.readouterr().out)["modelpool"]["models"]
    classes = [member["architecture"]["num_classes"] for member in shown.values()]
    assert classes == [1000, 5, 1000]


def test_an_internal_error_keeps_its_traceback(main_in, tmp_path) -> None:
    """It passes through: Python prints it whole and leaves with 1."""
    (tmp_path / "broken_algorithm.py").write_text(
        "from fusion import BaseAlgorithm\n"
        "class Mine(BaseAlgorithm):\n"
        "    def run(self, modelpool):\n"
        "        raise KeyError('inside')\n"
    )
    arguments = ["method=custom", "method._target_=broken_algorithm.Mine", "fast_dev_run=true"]
    with pytest.raises(KeyError, match="inside"):
        main_in(DIGITS, *arguments)
