from __future__ import annotations

import collections
import functools

import pytest

from fusion.errors import UserError
from fusion.target import build, build_nested, check_options, is_target, locate


def box(inside: object = None, *rest: object, size: int = 1, name: str | None = None) -> tuple:
    return inside, rest, size, name


@pytest.fixture(autouse=True)
def _importable(monkeypatch) -> None:
    """Tests are imported by path; the registry goes by name."""
    import sys
    import types

    module = types.ModuleType("boxes")
    module.box = box
    module.broken = None
    monkeypatch.setitem(sys.modules, "boxes", module)


def test_options_and_positions_are_given() -> None:
    spec = {"_target_": "boxes.box", "_args_": [1, 2], "size": 3}
    assert build(spec) == (1, (2,), 3, None)
    assert build(spec, name="x") == (1, (2,), 3, "x")
    assert spec == {"_target_": "boxes.box", "_args_": [1, 2], "size": 3}


def test_nested_targets_are_built_first_unless_told_otherwise() -> None:
    inner = {"_target_": "boxes.box", "size": 7}
    built = (None, (), 7, None)
    assert build({"_target_": "boxes.box", "inside": [{"k": inner}]})[0] == [{"k": built}]
    kept = build({"_target_": "boxes.box", "inside": inner, "_recursive_": False})
    assert kept[0] == inner
    assert build_nested({"a": (inner, 1)}) == {"a": (built, 1)}


def test_a_partial_is_left_unfinished() -> None:
    made = build({"_target_": "boxes.box", "size": 2, "_partial_": True})
    assert isinstance(made, functools.partial)
    assert made("x") == ("x", (), 2, None)


def test_what_is_a_target() -> None:
    assert is_target({"_target_": "x"})
    assert not is_target({"target": "x"})
    assert not is_target("x")


def test_nested_classes_and_modules_are_found() -> None:
    assert locate("collections.OrderedDict") is collections.OrderedDict
    assert locate("collections.OrderedDict.fromkeys") == collections.OrderedDict.fromkeys


def test_a_function_hides_the_module_that_it_is_named_like() -> None:
    import torchvision

    assert locate("torchvision.models.alexnet") is torchvision.models.alexnet


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere.Mine", "there is no module 'nowhere'; give the import path"),
        ("collections.OrderdDict", "'collections' has no 'OrderdDict'; did you mean 'OrderedDict'"),
        ("boxes.broken", "'boxes.broken' is not callable"),
        ("Mine", "there is no module 'Mine'"),
        ("", "there is no module ''"),
        ("a..b", "there is no module 'a'"),
    ],
)
def test_a_path_that_leads_nowhere_is_told(path, said) -> None:
    with pytest.raises(UserError, match=said):
        locate(path)


def test_an_error_inside_the_users_module_is_theirs(tmp_path, monkeypatch) -> None:
    (tmp_path / "users_own.py").write_text("import not_installed_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        locate("users_own.Mine")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sise": 1}, r"boxes.box has no option 'sise'; did you mean 'size'\? \(options: inside, "),
        ({"size": "big"}, "box.size is 'big'; give a whole number"),
        ({"size": 1.5}, "box.size is 1.5; give a whole number"),
        ({"size": True}, "box.size is true; give a whole number"),
        ({"name": 3}, "box.name is 3; give text or null"),
    ],
)
def test_options_must_fit_the_signature(options, said) -> None:
    with pytest.raises(UserError, match=said):
        build({"_target_": "boxes.box", **options})


def test_a_missing_option_is_told() -> None:
    def needs(*, path: str) -> None: ...

    with pytest.raises(UserError, match="where: missing a required argument: 'path'"):
        check_options(needs, "where", (), {})
    check_options(needs, "where", (), {}, partial=True)


def test_an_option_that_is_not_built_yet_is_taken_for_what_it_would_be() -> None:
    def takes(*, inside: collections.OrderedDict) -> None: ...

    check_options(takes, "where", (), {"inside": {"_target_": "collections.OrderedDict"}})
    with pytest.raises(UserError, match=r"where\.inside is 3; give an OrderedDict, or"):
        check_options(takes, "where", (), {"inside": 3})


def test_a_target_with_open_keywords_takes_any() -> None:
    assert build({"_target_": "builtins.dict", "a": 1}) == {"a": 1}
