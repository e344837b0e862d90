"""UserError and its suggestions."""

import pickle

from elm_jax.errors import UserError, closest, nearest


def test_a_user_error_reads_as_where_found_expected_and_fix() -> None:
    error = UserError("data.fold", "9", "1 to 5", "choose another fold")
    assert str(error) == "data.fold: found 9; expected 1 to 5; choose another fold"
    assert isinstance(error, ValueError)


def test_a_user_error_is_one_line_whatever_its_parts_hold() -> None:
    error = UserError("file.csv\r\n", "a\n  b", "one\tline", "mend\u2028it")
    assert str(error) == "file.csv: found a b; expected one line; mend it"
    assert len(str(error).splitlines()) == 1


def test_a_user_error_is_short_whatever_its_parts_hold() -> None:
    assert len(str(UserError(*(4 * ["x" * 1_000_000])))) < 10_000


def test_a_user_error_survives_the_way_out_of_a_loader_process() -> None:
    error = pickle.loads(pickle.dumps(UserError("a", "b", "c", "d")))
    assert isinstance(error, UserError)
    assert (error.where, error.found, error.expected, error.fix) == ("a", "b", "c", "d")


def test_nearest_suggests_what_is_close_and_nothing_else() -> None:
    assert nearest("lrr", ["lr", "epochs"]) == "did you mean 'lr'?"
    assert nearest("zzz", ["lr", "epochs"]) == ""
    assert nearest("lr", []) == ""


def test_nearest_ignores_case_and_answers_in_the_case_of_the_choice() -> None:
    assert closest("avr", ["I", "aVR", "aVL"]) == "aVR"
    assert nearest("MERL", iter(["merl"])) == "did you mean 'merl'?"
