"""Starting weights of other classes or another grid."""

from dataclasses import asdict

import pytest
import torch

from autoregressive.models.gpt import Transformer, preset
from autoregressive.train.fine_tune import TABLE, fitted
from autoregressive.train.testing import SCRIPT, flags, write_codes
from utils import checkpoint
from utils.cli import InputError
from utils.records import read_json
from utils.testing import assert_refused, fill_by_formula, run_script

OLD = ["cat", "dog", "bird", "fish"]


def weights(rows: int = 4, width: int = 3) -> dict[str, torch.Tensor]:
    return {TABLE: torch.arange((rows + 1) * width).reshape(-1, width).float(), "output.weight": torch.ones(2, width)}


def fit(names, init_classes=(), about=None, number=None, tokens=16):
    about = {"classes": OLD, "config": {"block_size": 16}} if about is None else about
    number = len(names) if number is None else number
    return fitted(weights(), about, classes=names, num_classes=number, tokens=tokens, init_classes=init_classes)


def test_classes_begin_as_told_or_by_name_or_as_the_mean_and_the_null_class_is_kept():
    old = weights()
    state, line = fit(["wolf", "cat", "tree"], ["wolf=dog"])
    mean = old[TABLE][:4].mean(0)
    assert torch.equal(state[TABLE], torch.stack((old[TABLE][1], old[TABLE][0], mean, old[TABLE][4])))
    assert torch.equal(state["output.weight"], old["output.weight"])
    expected = (
        "class table of 4 classes made anew for 3 (1 by --init-classes, 1 by name, 1 as the mean); null class kept"
    )
    assert line == expected


def test_the_same_classes_stay_as_they_are():
    for names, about in ((OLD, None), ([], None), (["a", "b", "c", "d"], {})):
        state, line = fit(names, about=about, number=4)
        assert torch.equal(state[TABLE], weights()[TABLE]) and line == ""


def test_other_names_in_the_same_number_are_other_classes():
    state, _ = fit(["fish", "cat", "dog", "bird"])
    assert torch.equal(state[TABLE], weights()[TABLE][[3, 0, 1, 2, 4]])


def test_numbers_serve_where_there_are_no_names_and_a_grid_is_said():
    state, line = fit(["a", "b"], ["a=3", "1=2"], about={"config": {"block_size": 64}})
    assert torch.equal(state[TABLE], weights()[TABLE][[3, 2, 4]])
    assert line.startswith("grid of 8x8 codes, now 4x4; class table of 4 classes")


def test_of_a_name_that_stands_twice_the_first_class_is_taken():
    state, _ = fit(["x", "y"], ["x=crane"], about={"classes": ["crane", "b", "crane", "d"]})
    assert torch.equal(state[TABLE][0], weights()[TABLE][0])


@pytest.mark.parametrize(
    ("text", "part"), [("cow=cat", "the data have no class 'cow'"), ("a=cow", "the weights have no class 'cow'"),
                       ("a", "no class ''"), ("a=9", "no class '9'")],
)  # fmt: skip
def test_a_wrong_pair_is_one_line(text, part):
    with pytest.raises(InputError, match=part):
        fit(["a", "b"], [text])
    with pytest.raises(InputError, match="twice"):
        fit(["a", "b"], ["a=cat", "a=dog"])


def test_a_training_starts_from_other_classes_says_so_and_records_it(tmp_path):
    codes = write_codes(tmp_path / "codes")
    torch.manual_seed(0)
    config = preset("GPT-XXS", vocab_size=64, num_classes=7, block_size=64)
    model = fill_by_formula(Transformer(config))
    start = tmp_path / "start.pt"
    checkpoint.save(start, {"model": model.state_dict(), "config": asdict(config), "steps": 3})
    arguments = [*flags(codes, tmp_path / "runs"), "--epochs", "1", "--patch-level", "1"]
    result = run_script(SCRIPT, *arguments, "--gpt-ckpt", start, "--init-classes", "0=6")
    assert result.returncode == 0, result.stderr
    line = "class table of 7 classes made anew for 3 (1 by --init-classes, 2 as the mean); null class kept"
    assert f"grid of 8x8 codes, now 4x4; {line}" in result.stderr
    args = read_json(tmp_path / "runs" / "000-GPT-XXS" / "run.json")["args"]
    assert args["start_changed"].endswith(line) and args["init_classes"] == ["0=6"]
    other = preset("GPT-XXS", vocab_size=32, num_classes=7, block_size=64)
    checkpoint.save(start, {"model": Transformer(other).state_dict(), "config": asdict(other), "steps": 3})
    other_weights = run_script(SCRIPT, *arguments, "--fresh", "--gpt-ckpt", start)
    assert_refused(other_weights, "tok_embeddings.weight is (32, 128)")
    assert_refused(run_script(SCRIPT, *arguments, "--init-classes", "0=6"), "--gpt-ckpt")
