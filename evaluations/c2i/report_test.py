"""How figures are printed: lines, table, and which files make a sweep."""

from pathlib import Path

from evaluations.c2i import report

FIGURES = {
    "fid": 12.345678901, "recall": 0.25, "precision": 0.5, "sfid": 6.5, "inception_score": 100.25,
    "inception_score_shuffled": 100.0,
}  # fmt: skip


def test_the_published_lines():
    assert report.figure_lines(FIGURES, "Inception") == [
        "Inception Score: 100.25", "FID: 12.345678901", "sFID: 6.5", "Precision: 0.5", "Recall: 0.25",
    ]  # fmt: skip


def test_another_network_stands_in_the_label():
    found = report.figure_lines({"fid": 12.345678901, "class_accuracy": 0.5}, "eye")
    assert found == ["FID(eye): 12.3457", "Class accuracy(eye): 0.5000"]


def test_table():
    rows = [("a.npz", 50000, FIGURES), ("b.npz", 100, {"fid": 1.0, "kid": 0.001})]
    title, head, first, second = report.table(rows, "Inception").splitlines()
    assert title == "In the features of Inception:"
    assert head.split() == ["images", "Inception", "Score", "FID", "sFID", "Precision", "Recall", "KID", "file"]
    assert first.split() == ["50000", "100.2500", "12.3457", "6.5000", "0.5000", "0.2500", "-", "a.npz"]
    assert second.split() == ["100", "-", "1.0000", "-", "-", "-", "0.0010", "b.npz"]
    assert len({len(line.rsplit("  ", 1)[0]) for line in (head, first, second)}) == 1


def test_sweeps_are_files_that_differ_in_the_scale_only():
    names = ["a-cfg-2.0-seed-0", "a-cfg-1.75-seed-0", "a-cfg-2.0-seed-1", "b-cfg-2.0-seed-0", "c", "a-cfg-10-seed-0"]
    rows = [(Path("x") / f"{name}.npz", {"fid": float(i)}) for i, name in enumerate(names)]
    assert report.sweeps(rows) == {
        Path("x/a-cfg-sweep-seed-0.png"): {1.75: {"fid": 1.0}, 2.0: {"fid": 0.0}, 10.0: {"fid": 5.0}},
    }
    assert list(report.sweeps(rows)[Path("x/a-cfg-sweep-seed-0.png")]) == [1.75, 2.0, 10.0]
