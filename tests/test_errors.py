from __future__ import annotations

import pickle

from fusion.errors import UserError, suggestion


def test_the_nearest_name_is_suggested_and_nothing_that_is_far() -> None:
    assert suggestion("top_q", ["top_p", "seed"]) == "; did you mean 'top_p'?"
    assert suggestion("zebra", ["top_p", "seed"]) == ""
    assert suggestion("x", []) == ""


def test_the_order_of_the_names_does_not_matter() -> None:
    assert suggestion("ab", ["ac", "bb"]) == suggestion("ab", ["bb", "ac"])


def test_an_error_comes_back_whole_from_another_process() -> None:
    again = pickle.loads(pickle.dumps(UserError("one sentence")))
    assert isinstance(again, UserError)
    assert str(again) == "one sentence"
