"""Parts of codes from several machines: put together they are the whole; what does not fit is one line."""

import pytest

from dataset.codes.toy import files, unfinish, write_codes


@pytest.fixture
def parts(tmp_path):
    """Three parts of 23 images in shards of 5, and the whole; three images could not be read."""
    options = {"shard_size": 5, "skipped": (0, 11, 22), "tokenizer_sha256": "aa"}
    write_codes(tmp_path / "whole", **options)
    for i in (1, 2, 3):
        write_codes(tmp_path / f"p{i}", part=f"{i}/3", **options)
    return [tmp_path / f"p{i}" for i in (1, 2, 3)]


def test_merged_parts_are_the_whole_in_any_order_also_after_a_cut(parts, tmp_path, command):
    out = tmp_path / "out"
    status, text, _ = command("merge", out, parts[2], parts[0], parts[1])
    assert status == 0 and "is written: 23 images of 3 parts" in text
    assert files(out) == files(tmp_path / "whole")
    assert command("check", out)[0] == 0
    assert "is complete already" in command("merge", out, *parts)[1]
    unfinish(out)
    (out / "toy32_codes" / "00003.npy").unlink()
    kept = (out / "toy32_codes" / "00002.npy").stat().st_mtime_ns
    assert command("merge", out, *parts)[0] == 0
    assert files(out) == files(tmp_path / "whole")
    assert (out / "toy32_codes" / "00002.npy").stat().st_mtime_ns == kept


def test_what_does_not_fit_is_refused(parts, tmp_path, command):
    options = {"shard_size": 5, "skipped": (0, 11, 22)}
    others = {
        "tokenizer": {"tokenizer_sha256": "bb", "part": "2/3"},
        "settings": {"tokenizer_sha256": "aa", "part": "2/3", "precision": "bf16"},
        "number": {"tokenizer_sha256": "aa", "part": "2/4"},
        "same": {"tokenizer_sha256": "aa", "part": "1/3"},
    }
    for name, more in others.items():
        write_codes(tmp_path / name, **options, **more)
    first, second, third = parts
    cases = [
        ((first, third), "part 2/3 is missing: expected 3 parts, got 2"),
        ((first, tmp_path / "same", second, third), "are both part 1/3"),
        ((first, tmp_path / "tokenizer", third), "tokenizer_sha256 aa, now bb"),
        ((first, tmp_path / "settings", third), "precision fp32, now bf16"),
        ((first, tmp_path / "number", third), "parts 3, now 4"),
        ((tmp_path / "whole",), "is no part of codes"),
    ]
    for given, line in cases:
        status, _, errors = command("merge", tmp_path / "out", *given)
        assert status == 2 and line in errors[-1], errors
    unfinish(second)
    assert "is unfinished" in command("merge", tmp_path / "out", *parts)[2][-1]
    assert not (tmp_path / "out").exists()


def test_a_part_that_was_changed_on_its_way_is_refused(parts, tmp_path, command):
    path = parts[1] / "toy32_codes" / "00002.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    status, _, errors = command("merge", tmp_path / "out", *parts)
    assert status == 2 and "was changed after it was written" in errors[-1]
    assert not (tmp_path / "out" / "toy32.json").exists()
