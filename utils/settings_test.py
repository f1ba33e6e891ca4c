"""Settings: flags, one-line errors, records and what may change on resume."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import model_validator

from utils.settings import (
    AtLeastOne,
    Count,
    ExistingFile,
    Fraction,
    ImageSize,
    NonNegative,
    Positive,
    PositiveFraction,
    PositiveInt,
    Seed,
    Settings,
    differences,
    one_of,
    setting,
)  # fmt: skip


class Example(Settings):
    source: Path = setting(help="what is read", positional=True)
    epochs: PositiveInt = setting(300, "passes over the data")
    lr: Positive = setting(1e-4)
    scales: list[AtLeastOne] = setting([1.5], "one or more")
    drop: Fraction = setting(0.1, "100 % drops everything")
    rate: PositiveFraction | None = setting(None)
    wait: NonNegative = setting(0.0)
    model: one_of({"A": 1, "B": 2}) = setting("A")
    steps: list[PositiveInt] | None = setting(None)
    compile: bool | None = setting(None)
    fresh: bool = setting(False, free=True)
    log_every: PositiveInt = setting(100, free=True)
    seed: Seed = setting(0)
    keep: Count = setting(3, free=True)
    side: ImageSize = setting(256)
    extra: ExistingFile | None = setting(None)

    @model_validator(mode="after")
    def _check(self):
        if self.rate and self.steps:
            raise ValueError("--rate and --steps exclude each other")
        return self


def parse(*arguments: str) -> Example:
    return Example.from_command_line("An example.\n\nMore.", arguments)


def test_flags_become_values():
    s = parse("in", "--epochs", "7", "--scales", "1", "2.5", "--model", "B", "--no-compile")
    assert (s.source, s.epochs, s.scales, s.model, s.compile) == (Path("in"), 7, [1, 2.5], "B", False)
    assert (s.lr, s.steps, s.fresh, parse("in", "--fresh").fresh, parse("in").compile) == (
        1e-4,
        None,
        False,
        True,
        None,
    )
    assert parse("in", "--steps", "1", "2").steps == [1, 2]


def test_a_home_folder_that_the_shell_did_not_expand(monkeypatch):
    """As in --results-dir=~/results."""
    monkeypatch.setenv("HOME", "/home/me")
    assert parse("~/in").source == Path("/home/me/in")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["in", "--epochs", "0"], "argument --epochs: expected a whole number from 1 to 2**31 - 1, got 0"),
        (["in", "--epochs", "1.5"], "argument --epochs: expected a whole number from 1 to 2**31 - 1, got 1.5"),
        (["in", "--epochs", "many"], "argument --epochs: expected a whole number from 1 to 2**31 - 1, got 'many'"),
        (["in", "--epochs", "9" * 30], f"argument --epochs: expected a whole number from 1 to 2**31 - 1, got {'9' * 30}"),
        (["in", "--lr", "nan"], "argument --lr: expected a number above 0, got nan"),
        (["in", "--lr", "inf"], "argument --lr: expected a number above 0, got inf"),
        (["in", "--drop", "1.01"], "argument --drop: expected a number in [0, 1], got 1.01"),
        (["in", "--scales", "1", "0.5"], "argument --scales: expected a number of at least 1 (1 is off), got 0.5"),
        (["in", "--rate", "0"], "argument --rate: expected a number in (0, 1], got 0"),
        (["in", "--seed", str(2**64)], f"argument --seed: expected a whole number from 0 to 2**63 - 1, got {2**64}"),
        (["in", "--side", "2000000000"], "argument --side: expected a whole number from 1 to 8192, got 2000000000"),
        (["in", "--steps", "3", "-1"], "argument --steps: expected a whole number from 1 to 2**31 - 1, got -1"),
        (["in", "--extra", "nowhere"], "argument --extra: there is no file nowhere"),
        (["in", "--extra", "x" * 5000], f"argument --extra: there is no file {'x' * 200}..."),
        (["in", "--rate", ".5", "--steps", "1"], "--rate and --steps exclude each other"),
        (["in", "--model", "C"], "argument --model: invalid choice: 'C' (choose from "),
        ([], "the following arguments are required: source"),
        (["in", "--extra", ""], "argument --extra: expected a value, got an empty text (an unset shell variable?)"),
        ([""], "argument source: expected a value, got an empty text"),
        (["in", "--scales", "1", ""], "argument --scales: expected a value, got an empty text"),
        (["in", "--epochs"], "argument --epochs: expected one argument"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line(capsys, arguments, line):
    with pytest.raises(SystemExit) as exit:
        parse(*arguments)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and not out and err.count("\n") == 1
    assert err.startswith(f"error: {line}") and "--help)" in err


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "An example." in text and "More." not in text
    assert "passes over the data (default: 300)" in text and "one or more (default: 1.5)" in text
    assert "100 % drops everything (default: 0.1)" in text and "{A,B}" in text and "--no-compile" in text


def test_settings_are_recorded_as_plain_data_and_cannot_change():
    s = parse("in", "--steps", "1", "2")
    assert s.plain()["source"] == "in" and s.plain()["steps"] == [1, 2]
    assert Example(**s.plain()) == s
    with pytest.raises(ValueError, match="frozen"):
        s.epochs = 1


def test_differences_name_what_would_be_other_work():
    old, new = parse("in").plain(), parse("in", "--lr", "2e-4", "--log-every", "1").plain()
    assert differences(old, new, Example.free()) == ["lr 0.0001, now 0.0002"]
    assert differences(old, new) == ["lr 0.0001, now 0.0002", "log_every 100, now 1"]
    del old["lr"]
    assert differences(old, new, Example.free()) == []
    assert differences(old, new, Example.free(), Example.defaults()) == ["lr 0.0001, now 0.0002"]
    assert differences(old, parse("in").plain(), (), Example.defaults()) == []
    assert "source" not in Example.defaults()


@given(st.text(max_size=20))
def test_any_text_is_a_value_or_one_line(text):
    """No text ends in another exception than the parser's exit."""
    for flag in ("--epochs", "--lr", "--scales", "--rate", "--extra", "--seed"):
        try:
            parse("in", f"{flag}={text}")
        except SystemExit as exit:
            assert exit.code in (0, 2)
