"""check: what it says of good codes, what it finds wrong with bad ones, and the picture it draws."""

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.codes import Place, survey
from dataset.codes.folders import open_folder
from dataset.codes.repack_test import published
from dataset.codes.toy import CLASSES, write_codes
from tokenizer.tokenizer_image.vq_model import VQModel, preset
from utils import checkpoint
from utils.draw import image_grid
from utils.pixels import to_uint8
from utils.testing import fill_by_formula


@pytest.fixture
def check(command):
    return lambda *arguments: command("check", *arguments)


def test_good_codes(tmp_path, check, layout):
    codes = np.random.default_rng(0).integers(100, 300, size=(23, 2, 16))
    codes[5] = codes[4]
    write_codes(tmp_path, layout, codes=codes, labels=np.arange(23) % 2, vq_model="VQ-16", tokenizer_sha256="f00d")
    status, out, wrong = check(tmp_path)
    assert (status, wrong) == (0, [])
    rows = dict(line.split(maxsplit=1) for line in out.splitlines()[:-1])
    used = len(np.unique(codes))
    assert (
        rows["layout"]
        == {"packed": "packed, uint16, 3 shards of 10 images", "per-image": "per-image, one file an image"}[layout]
    )
    assert (rows["images"], rows["views"], rows["tokens"]) == ("23", "2 (single)", "16 (4 x 4) a view")
    assert rows["ids"] == f"{codes.min()} to {codes.max()}, codebook 512"
    assert rows["usage"].startswith(f"{used} ids ({used / 512:.1%} of the codebook)")
    assert rows["classes"] == "2, images a class: min 11, median 11.5, max 12"
    assert rows["empty"] == "1 classes without images: c"
    assert rows["duplicates"].startswith("1 images")
    assert rows["tokenizer"] == "VQ-16, f00d"
    assert out.splitlines()[-1] == "nothing is wrong"


def test_perplexity_and_counts_do_not_depend_on_how_much_is_read_at_once(tmp_path, monkeypatch):
    codes, _ = write_codes(tmp_path, codebook=4, images=23)
    share = np.bincount(codes.reshape(-1)) / codes.size
    folder = open_folder(Place(tmp_path, "toy", 32))
    whole = survey.survey(folder, 4, show=False)
    assert whole.perplexity == pytest.approx(2 ** -(share * np.log2(share)).sum())
    monkeypatch.setattr(survey, "CODES_AT_ONCE", 7 * codes[0].size)  # across the shards of ten
    assert survey.survey(folder, 4, show=False).lines() == whole.lines()


def test_codes_and_labels_out_of_range_are_found(tmp_path, check, layout, monkeypatch):
    monkeypatch.setattr(survey, "CODES_AT_ONCE", 4 * 2 * 16)
    codes = np.random.default_rng(0).integers(300, size=(23, 2, 16))
    codes[11, 1, 3], codes[20, 0, 0] = 300, 511
    write_codes(tmp_path, layout, codes=codes, labels=np.array([0, 1, 3, -1, *[2] * 19]))
    status, out, wrong = check(tmp_path, "--codebook-size", 300)
    assert status == 1 and "nothing is wrong" not in out
    name = {"packed": "00001.npy", "per-image": "11.npy"}[layout]
    assert wrong[0].startswith("wrong: 2 codes are outside the codebook of 300 (they span 0 to 511)")
    assert wrong[0].endswith(f"{name}, image 11")
    assert wrong[1:] == [
        f"wrong: 2 labels are out of range (expected 0 to 2), the first in {tmp_path / 'toy32_labels'}: image 2 has label 3"
    ]
    assert "at most" in check(tmp_path, "--codebook-size", 2**31 - 1)[2][0]


def test_sick_codes_are_found(tmp_path, check, layout):
    """What a tokenizer that is not finite makes of any image: one code everywhere."""
    for code in (0, 7):
        write_codes(tmp_path / str(code), layout, codes=np.full((23, 2, 16), code))
        status, _, (wrong,) = check(tmp_path / str(code))
        assert status == 1 and f"all codes are {code}, as a tokenizer" in wrong
    write_codes(tmp_path / "same", layout, codes=np.tile(np.arange(16), (23, 2, 1)))
    status, _, (wrong,) = check(tmp_path / "same")
    assert status == 1 and "all 23 images have the same codes" in wrong


def test_altered_bytes_and_skipped_images_are_told(tmp_path, check, layout):
    write_codes(tmp_path, layout, skipped=[4, 5])
    status, out, _ = check(tmp_path)
    assert status == 0
    assert "skipped     2 images: 4 a/4.png (broken); 5 a/5.png (broken)" in out
    path = tmp_path / "toy32_codes" / ("00001.npy" if layout == "packed" else "13.npy")
    codes = np.load(path)
    codes[0, 1, 3] ^= 1
    np.save(path, codes)
    status, _, (wrong,) = check(tmp_path)
    assert status == 1
    assert ("00001.npy" if layout == "packed" else "10.npy") in wrong and "was changed after it was written" in wrong


def test_gaps_and_damage_of_published_codes_are_told(tmp_path, check):
    published(tmp_path)
    for folder in ("toy32_codes", "toy32_labels"):
        (tmp_path / folder / "12.npy").unlink()
    status, out, _ = check(tmp_path)
    assert status == 0
    assert "0 to 22, with gaps" in out and "no manifest" in out
    path = tmp_path / "toy32_codes" / "3.npy"
    np.save(path, np.full((1, 2, 16), np.nan))
    status, _, wrong = check(tmp_path)
    assert (status, len(wrong)) == (1, 1) and "3.npy holds float64, 32 of its values not finite" in wrong[0]
    path.write_bytes(path.read_bytes()[:-1])
    status, _, wrong = check(tmp_path)
    assert status == 1 and "3.npy is truncated or damaged" in wrong[0]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    config = preset("VQ-4-small", codebook_size=512)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tokenizer") / "vq.pt"
    model = fill_by_formula(VQModel(config)).eval()
    torch.save({"model": model.state_dict(), "vq_model": "VQ-4-small", "config": vars(config)}, path)
    return path, model


def decode(model: VQModel, codes: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.concatenate([to_uint8(model.decode_code(torch.from_numpy(row[None]))).numpy() for row in codes])


def close(path, expected: Image.Image) -> bool:
    """Equal but for the last bit of a pixel (batches of other sizes add up in another order)."""
    drawn = np.array(Image.open(path)).astype(int)
    return drawn.shape == np.array(expected).shape and np.abs(drawn - np.array(expected)).max() <= 1


def test_all_views_of_an_image_stand_in_a_row(tmp_path, check, tokenizer_file):
    path, model = tokenizer_file
    codes, labels = write_codes(tmp_path, views=3, tokenizer_sha256=checkpoint.identity(model.state_dict()))
    status, out, _ = check(tmp_path, "--vq-ckpt", path, "--out", tmp_path / "new" / "codes.png")
    assert status == 0
    assert "note:" not in out
    rows = np.concatenate([codes[np.flatnonzero(labels == i)[0]] for i in range(3)])
    expected = image_grid(decode(model, rows), 3, CLASSES, scale=4)
    assert close(tmp_path / "new" / "codes.png", expected)
    assert not close(tmp_path / "new" / "codes.png", image_grid(decode(model, rows[::-1]), 3, CLASSES, scale=4))


def test_a_row_is_a_class(tmp_path, check, tokenizer_file):
    path, model = tokenizer_file
    codes, labels = published(tmp_path, views=1, images=40)
    out = tmp_path / "codes.png"
    status, *_ = check(tmp_path, "--vq-ckpt", path, "--out", out, "--rows", 2, "--columns", 2, "--codebook-size", 512)
    assert status == 0
    rows = np.concatenate([codes[np.flatnonzero(labels == i)[[0, -1]], 0] for i in (0, 2)])
    assert close(out, image_grid(decode(model, rows), 2, ["class 0", "class 2"], scale=4))


def test_another_tokenizer_or_a_picture_that_cannot_be_written(tmp_path, check, tokenizer_file):
    path, _ = tokenizer_file
    write_codes(tmp_path / "a", tokenizer_sha256="f00d")
    _, out, _ = check(tmp_path / "a", "--vq-ckpt", path, "--out", tmp_path / "codes.png")
    assert "note:" in out and "is not the tokenizer that the codes were made by" in out
    write_codes(tmp_path / "b", codebook=1024)
    status, _, wrong = check(tmp_path / "b", "--vq-ckpt", path, "--out", tmp_path / "codes.png")
    assert status == 2 and "has a codebook of 512, the codes are of one of 1024" in wrong[0]
    status, out, wrong = check(tmp_path / "a", "--vq-ckpt", path, "--out", tmp_path / "codes.xyz")
    assert (status, out) == (2, "") and "expected a name that ends in .png" in wrong[0]  # before the work
