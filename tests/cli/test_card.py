"""Cards through the command: written for one expert or for all, and read by a merge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion.modelpool.card import Card

POOL = ["modelpool=digits_split", "fast_dev_run=true"]
TASKS = ("low", "high")
FOLDED = ["method=regmean", "method.rule.folded=true", "method.batch_norm=merge"]


def test_cards_of_all_experts_are_written_and_merged(main_in, capsys) -> None:
    main_in("card=all", *POOL, "to=cards", "images=64", "batch_size=32")
    files = {task: Path("cards") / f"{task}.card.safetensors" for task in TASKS}
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(" (")[0] for line in told] == [f"Wrote {f}" for f in files.values()]
    assert all(Card(file).note.images == 64 for file in files.values())
    given = [f"+modelpool.cards.{task}={file}" for task, file in files.items()]
    main_in(*FOLDED, *POOL, *given, "output_path=run")
    report = json.loads(Path("run/report.json").read_text())
    assert report["algorithm"]["cards"] == list(TASKS)
    # The cards are what is merged: with a damaged one nothing is.
    files["high"].write_bytes(files["high"].read_bytes()[:-1])
    with pytest.raises(SystemExit):
        main_in(*FOLDED, *POOL, *given, "output_path=again")
    assert "damaged" in capsys.readouterr().err
    assert not Path("again").exists()


def test_the_card_of_one_expert_replaces_a_file_only_if_told_to(main_in, capsys) -> None:
    one = ["card=low", *POOL, "to=low.card.safetensors", "images=8"]
    main_in(*one)
    written = Path("low.card.safetensors").read_bytes()
    with pytest.raises(SystemExit) as ended:
        main_in(*one)
    assert ended.value.code == 2
    assert "the file is there already" in capsys.readouterr().err
    main_in(*one, "overwrite=true", "seed=0")
    assert Path("low.card.safetensors").read_bytes() == written  # equal input, equal bytes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["to=x"], "card needs the pool that has the expert: modelpool=NAME"),
        ([*POOL], "card needs an expert and a file"),
        ([*POOL, "to=x", "images=1"], "images=1: give a whole number of 2 or more"),
        ([*POOL, "to=x", "overwrite=yes"], "overwrite=yes: give true or false"),
        ([*POOL, "to=x", "-m"], "card takes no flag but --config-dir; leave -m out"),
        (["modelpool=digits_splt", "to=x"], "did you mean 'digits_split'"),
        ([*POOL, "modelpool.tasks=1", "to=x"], "modelpool has no option 'tasks'"),
        ([*POOL, "to=x"], "the pool has no expert 'partiy' (it has low, high)"),
    ],
)
def test_mistakes_are_told_in_a_sentence(main_in, capsys, arguments, said) -> None:
    with pytest.raises(SystemExit) as ended:
        main_in("card=partiy", *arguments)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("fusion_bench: error: ")
    assert said in told
    assert len(told.splitlines()) == 1
    assert list(Path().iterdir()) == []
