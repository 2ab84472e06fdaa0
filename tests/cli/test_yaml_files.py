"""What is wrong with a user's own YAML is said by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion.cli.yaml_files import check_files, fault
from fusion.errors import UserError

TARGET = "_target_: fusion.method.DummyAlgorithm\n"
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
FAULTS: list[tuple[str | bytes, str]] = [
    (f"{TARGET}\tk: 1\n", "line 2: there is a tab; YAML is indented by spaces only"),
    (f"{TARGET}k: 1\nk: 2\n", "line 3: the name 'k' stands twice; leave one of them out"),
    (
        f"{TARGET}k: [1, 2\nz: 3\n",
        "line 3 is no YAML while parsing a flow sequence: expected ',' or",
    ),
    (f'{TARGET}k: "a\n', "line 3 is no YAML while scanning a quoted scalar"),
    (f"{TARGET}: 1\n", "line 2 is no YAML"),
    (f"{TARGET}null: 1\n", "line 2: the name before ':' is empty; give one"),
    (f"{TARGET}? [a, b]\n: 1\n", "line 2: a name is a list or a mapping; give text"),
    (f"{TARGET}k: ${{seed\n", "line 2: '${seed' is no reference; write '${name}'"),
    (f"{TARGET}k: *nobody\n", "line 2 is no YAML: found undefined alias 'nobody'; correct"),
    (
        f"{TARGET}k: !!python/name:os.system\n",
        "line 2: the tag 'python/name:os.system' is not read",
    ),
    (f"{TARGET}k: 1{'0' * 5000}\n", "line 2: a number of 5001 digits; give a smaller one"),
    (f'{TARGET}k: "\\0"\n', "line 2: a text with a null character; leave it out"),
    (f"{TARGET}---\na: b\n", "line 2 is no YAML expected a single document in the stream: but"),
    (f"{TARGET}k: \x01\n", "unacceptable character #x0001"),
    ("- a\n- b\n", "line 1: it is a list; give name: value pairs"),
    ("text\n", "line 1: it is a single value; give name: value pairs"),
    ("a: &a [1, *a]\n", "line 1: an alias stands for itself; write it out"),
    (BOMB, "its aliases stand for 12345679021 entries; write out what is meant"),
    ("k: " + "[" * 3000, "is nested too deeply; write it with fewer levels"),
    ("defaults: dummy\n", "line 1: this is no default; give a list of entries such as"),
    ("defaults:\n  a: b\n", "line 2: this is no default"),
    ("defaults:\n  - {a: b, c: d}\n", "line 2: this is no default"),
    ("defaults:\n  - 3\n", "line 2: this is no default"),
    ("defaults:\n  - [a]\n", "line 2: this is no default"),
    ("defaults:\n  - method: {a: b}\n", "line 2: this is no default"),
    ("defaults:\n  - _self_\n  - mine\n", "line 3: the file names itself in its defaults"),
    (f"# Méthode\n{TARGET}".encode("latin-1"), "line 1: the byte 0xe9 is not UTF-8; save"),
    (f"# Mine\n{TARGET}".encode("utf-16"), "line 1: the byte 0xff is not UTF-8; save it as UTF-8"),
    (f"# Mine\n{TARGET}".encode("utf-16-le"), "unacceptable character #x0000"),
    (f"# Mine\n{TARGET}".encode("utf-32"), "line 1: the byte 0xff is not UTF-8; save it as UTF-8"),
]
GOOD: list[str | bytes] = [
    "",
    "# nothing but a comment\n",
    "defaults:\n  - merge # of ours\n  - _self_\n  - /taskpool: null\n  - override /fabric: cpu\n",
    f"{TARGET}k: ${{seed}}\nl: ${{oc.env:HOME,none}}/${{now:%H}}\nm: 2024-01-01\nn: .inf\n",
    "base: &base {k: 1}\nmore:\n  <<: *base\n  l: 2\n",
    f"# Mine\n{TARGET}".encode("utf-8-sig"),
]


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "method" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize(("text", "said"), FAULTS, ids=range(len(FAULTS)))
def test_a_fault_is_told_by_file_and_line(tmp_path, text, said) -> None:
    file = write(tmp_path, text)
    found = fault(file)
    assert found is not None
    assert found.startswith(f"'{file}'")
    assert said in found
    assert "\n" not in found
    with pytest.raises(UserError, match=r"mine\.yaml"):
        check_files([tmp_path], ["modelpool=digits", "method=mine"])


@pytest.mark.parametrize("text", GOOD, ids=range(len(GOOD)))
def test_a_good_file_passes(tmp_path, text) -> None:
    assert fault(write(tmp_path, text)) is None


def test_a_file_that_is_not_chosen_stops_a_run_only_if_it_would_take_for_ever(tmp_path) -> None:
    write(tmp_path / "one", f"{TARGET}\tk: 1\n")
    check_files([tmp_path / "one"], ["modelpool=digits", "method=dummy"])
    write(tmp_path / "other", BOMB)
    with pytest.raises(UserError, match="aliases stand for"):
        check_files([tmp_path / "other"], ["modelpool=digits", "method=dummy"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{TARGET}\tk: 1\n", "mine.yaml', line 2: there is a tab"),
        ("defaults:\n  - nothere\n", "mine.yaml', line 2: the default method=nothere: there is no"),
        (
            "defaults:\n  - /taskpool: digts\n",
            "line 2: the default taskpool=digts: there is no such",
        ),
        (
            "defaults:\n  - override /taskpol: x\n",
            "line 2: the configuration has no option 'taskpol'",
        ),
        (
            "defaults:\n  - other\n",
            "defaults: a YAML file names itself in its defaults, or another",
        ),
        (f"{TARGET}k: ${{nowhere}}\n", "method.k refers to '${nowhere}', which the configuration"),
        (
            f"{TARGET}k: ${{sed}}\n",
            "method.k refers to '${sed}', which the configuration does not have",
        ),
        (f"{TARGET}k: ${{method.k}}\n", "method.k: its reference cannot be resolved (Recursive"),
        (f"{TARGET}k: ${{nope:1}}\n", "method.k: its reference cannot be resolved (Unsupported"),
        (f"{TARGET}k: ${{oc.env:NO_SUCH}}\n", "Environment variable 'NO_SUCH' not found"),
        (
            f"# @package _globl_\n{TARGET}",
            "says '# @package' of another place; leave that line out",
        ),
        ("", "method is {}; give a BaseAlgorithm, or a mapping with _target_"),
        ("1: 2\n_target_: x\n", "a name in it, is 1; give text"),
    ],
)
def test_a_run_with_it_ends_in_one_sentence(main_in, tmp_path, capsys, text, said) -> None:
    write(tmp_path / "conf", text)
    (tmp_path / "conf" / "method" / "other.yaml").write_text("defaults:\n  - mine\n")
    with pytest.raises(SystemExit) as left:
        main_in("--config-dir", "conf", "method=mine", "modelpool=digits", "dry_run=true")
    err = capsys.readouterr().err
    assert left.value.code == 2
    assert err.count("\n") == 1
    assert err.startswith("fusion_bench: error: ")
    assert said in err


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_the_folder_may_be_named_anywhere(main_in, tmp_path, capsys, place) -> None:
    write(tmp_path / "conf", TARGET)
    arguments = ["method=mine", "modelpool=digits", "dry_run=true"]
    arguments[place:place] = ["--config-dir", "conf"]
    main_in(*arguments)
    assert "everything checked is in order" in capsys.readouterr().out
