from __future__ import annotations

import pytest

DIGITS = "modelpool=digits"
SNR = "method=snr_selective_merge"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("metod=dummy modelpool=digits", "no option 'metod'; did you mean 'method'?"),
        (f"{DIGITS} sed=3", "no option 'sed'; did you mean 'seed'?"),
        (f"{DIGITS} {SNR} method.topp=0.2", "method has no option 'topp'; did you mean 'top_p'?"),
        (
            f"{DIGITS} modelpool.models.expert_c.seed=1",
            "modelpool.models has no option 'expert_c'; did you mean 'expert_",
        ),
        (f"{DIGITS} fabric.acc=cpu", "fabric has no option 'acc'; it has "),
        (f"{DIGITS} hydra.job.nam=x", "hydra.job has no option 'nam'; did you mean 'name'?"),
        ("modelpool=digit", "no such modelpool; did you mean 'digits'?"),
        (f"{DIGITS} method=snr_selective_marge", "did you mean 'snr_selective_merge'?"),
        (f"{DIGITS} fabric/loggers=cs", "did you mean 'csv'?"),
        (f"{DIGITS} fabric/logger=csv", "did you mean 'fabric/loggers'?"),
        (f"{DIGITS} hydra/launcher=jobib", "did you mean 'joblib'?"),
        (f"{DIGITS} --multirn", "did you mean '--multirun'?"),
        (f"{DIGITS} --cfg jb", "invalid choice: 'jb'"),
        ("method=dummy", "choose a modelpool: modelpool=NAME, one of "),
        ("modelpool=null", "modelpool=null: a run needs a modelpool"),
        (f"{DIGITS} method=null", "a run needs a method; method=dummy merges nothing"),
        (f"{DIGITS} ~method", "a run needs a method"),
        (f"{DIGITS} seed=abc", "seed=abc: expected int, such as 0"),
        (f"{DIGITS} fast_dev_run=1", "fast_dev_run=1: expected bool, such as true or false"),
        (f"{DIGITS} method=custom", "method._target_ has no value; give it as method._target_="),
        (f"{DIGITS} seed=1,2", "to run a job for each, add --multirun"),
        (f"{DIGITS} foo", "the argument 'foo' cannot be read; options are given as name=value"),
        (f"{DIGITS} a=b=c", "the argument 'a=b=c' cannot be read"),
        (f"{DIGITS} -cn foo", "--config-name: there is no primary configuration 'foo'"),
        (f"{DIGITS} --config-dir nowhere", "nowhere' not found"),
        (f"{DIGITS} output_path=/proc/nowhere", "output_path: cannot make the run folder"),
        ("-m seed=1,2 modelpool=digits report_save_path=r.json", "would overwrite each other's"),
        ("-m seed=1,2 modelpool=digits merged_model_save_path=m.safetensors", "overwrite each"),
    ],
)
def test_a_mistake_is_told_in_a_sentence_before_torch(command, tmp_path, arguments, said) -> None:
    answer = command(*arguments.split())
    assert answer.code == 2
    assert answer.imported  # the trace works
    assert not {"torch", "lightning", "fusion.program"} & answer.imported
    last = answer.err.rstrip("\n").splitlines()[-1]
    assert last.startswith("fusion_bench: error: ")
    assert said in last
    assert "Traceback" not in answer.err + answer.out
    if "-m" not in arguments.split():  # a sweep leaves its list of jobs
        assert answer.err.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


def test_the_traceback_is_there_for_whoever_asks(command) -> None:
    answer = command("modelpool=digit", FUSION_DEBUG="1")
    assert answer.code != 0
    assert "Traceback (most recent call last)" in answer.err
    assert "did you mean 'digits'" in answer.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([SNR, "method.top_p=abc"], "top_p is 'abc', which is no float"),
        ([SNR, "method.top_p=2"], "top_p is 2; it is a share of the layers"),
        ([SNR, "method.rank_by=expert"], "did you mean 'experts'"),
        (["+method.k=3"], "fusion.method.DummyAlgorithm has no option 'k'"),
        (["method=custom", "method._target_=nowhere.Mine"], "there is no module 'nowhere'"),
        (["fabric.devices=77"], "Lightning Fabric refuses fabric.accelerator"),
        (["merged_model_save_path=m.pt"], "must end in .safetensors"),
        (["+modelpool.train_datasets._pretrained_.splt=x"], "did you mean 'split'"),
    ],
)
def test_what_only_the_program_can_find_is_told_alike(
    main_in, tmp_path, capsys, arguments, said
) -> None:
    if "77" in arguments[0]:
        arguments = [*arguments, "fabric.accelerator=gpu"]
    with pytest.raises(SystemExit) as left:
        main_in(DIGITS, *arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


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
