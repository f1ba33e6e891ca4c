"""Names, paths and addresses of weights; whose sampling settings a file gets."""

import hashlib
import json
import os

import pytest
import torch

from autoregressive.models import gpt
from pretrained_models.catalogue import CATALOGUE, LLAMAGEN, NPP, find_weights, published_sampling
from tokenizer.tokenizer_image import vq_model
from utils import download
from utils.cli import InputError
from utils.download import parse_address
from utils.files import sha256


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder of weights."""
    monkeypatch.setenv("PRETRAINED_MODELS", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


def downloaded(name: str, content: bytes = b"weights") -> None:
    """Leave a file and its record as a download does."""
    row = CATALOGUE[name]
    row.path.parent.mkdir(parents=True, exist_ok=True)
    row.path.write_bytes(content)
    record = {"repo": row.repo, "file": row.file, "revision": "a" * 40, "bytes": len(content)}
    record["sha256"] = hashlib.sha256(content).hexdigest()
    row.path.with_name(f"{row.path.name}.json").write_text(json.dumps(record))


def test_every_row_names_a_model_of_ours_and_a_file_of_its_own():
    for name, row in CATALOGUE.items():
        assert row.model in gpt.PRESETS or row.model in vq_model.PRESETS
        assert (row.cfg_scale is None) == row.model.startswith("VQ")
        assert row.file == f"{name.rpartition('/')[2]}.pt"
    assert len({row.path for row in CATALOGUE.values()}) == len(CATALOGUE)


class TestFind:
    def test_a_path_is_taken_as_it_is(self, tmp_path):
        (tmp_path / "a.pt").write_bytes(b"x")
        assert find_weights(str(tmp_path / "a.pt")) == tmp_path / "a.pt"
        assert find_weights(str(tmp_path)) == tmp_path

    def test_a_name_is_the_downloaded_file_or_the_users_own(self, folder, capsys):
        (folder / "c2i_B_256.pt").write_bytes(b"by hand")
        (folder / "vq_ds16_c2i.pt").write_bytes(b"by hand")
        assert find_weights("vq_ds16_c2i") == folder / "vq_ds16_c2i.pt"
        assert capsys.readouterr().err == ""
        assert find_weights("c2i_B_256") == folder / "c2i_B_256.pt"
        assert f"whether it is that of {NPP} or {LLAMAGEN} is not recorded" in capsys.readouterr().err
        downloaded("c2i_B_256")
        assert find_weights("c2i_B_256") == folder / NPP / "c2i_B_256.pt"

    def test_two_repositories_with_one_file_name_are_kept_apart(self, folder):
        downloaded("c2i_B_256", b"npp")
        downloaded("llamagen/c2i_B_256", b"llamagen")
        assert find_weights("c2i_B_256").read_bytes() == b"npp"
        assert find_weights("llamagen/c2i_B_256").read_bytes() == b"llamagen"

    def test_the_path_of_the_published_commands_finds_the_download(self, folder, monkeypatch):
        downloaded("vq_ds16_c2i")
        assert find_weights(str(folder / "vq_ds16_c2i.pt")) == CATALOGUE["vq_ds16_c2i"].path
        monkeypatch.chdir(folder.parent)
        assert find_weights("./weights/vq_ds16_c2i.pt") == CATALOGUE["vq_ds16_c2i"].path

    def test_a_changed_file_is_refused(self):
        downloaded("c2i_B_256")
        CATALOGUE["c2i_B_256"].path.write_bytes(b"weighty")
        with pytest.raises(InputError, match=r"is not the file that was downloaded .*: delete it"):
            find_weights("c2i_B_256")

    def test_a_file_is_hashed_once_until_it_changes(self, monkeypatch):
        downloaded("c2i_B_256")
        hashed, path = [], CATALOGUE["c2i_B_256"].path
        monkeypatch.setattr(download, "sha256", lambda path: hashed.append(path) or sha256(path))
        assert [find_weights("c2i_B_256") for _ in range(3)] == [path] * 3 and len(hashed) == 1
        os.utime(path, (1, 1))
        assert [find_weights("c2i_B_256") for _ in range(3)] == [path] * 3 and len(hashed) == 2

    def test_a_damaged_record(self):
        downloaded("c2i_B_256")
        record = CATALOGUE["c2i_B_256"].path.with_name("c2i_B_256.pt.json")
        whole = record.read_text()
        for damaged in ("{", "\x00" * 9, whole.replace('"bytes": 7', '"bytes": "many"')):
            record.write_text(damaged)
            with pytest.raises(InputError, match=r"c2i_B_256\.pt\.json is damaged: delete it"):
                find_weights("c2i_B_256")

    def test_a_json_file_of_another_kind_is_no_record(self, tmp_path):
        (tmp_path / "a.pt").write_bytes(b"x")
        for content in ('{"steps": 3}', "[1]"):
            (tmp_path / "a.pt.json").write_text(content)
            assert find_weights(str(tmp_path / "a.pt")) == tmp_path / "a.pt"

    def test_what_is_not_there(self, tmp_path):
        with pytest.raises(InputError, match=r"there is no file nowhere, nor is it one of vq_ds16_c2i, .*hf://"):
            find_weights("nowhere")
        with pytest.raises(InputError, match=r"there is no file .*c2i_L_384\.pt; python -m .* c2i_L_384"):
            find_weights(str(tmp_path / "c2i_L_384.pt"))

    @pytest.mark.parametrize(
        "text", ["hf://user/repo", "hf://user", "hf://user/repo/../../x", "hf://user/repo@/x", "hf:///a/b"]
    )
    def test_wrong_addresses(self, text):
        with pytest.raises(InputError, match="is no address of a file; expected hf://user/repo/file or"):
            find_weights(text)

    def test_addresses(self):
        assert parse_address("hf://user/re.po-1/a/b.pt") == ("user/re.po-1", "a/b.pt", None)
        assert parse_address("hf://user/repo@v1/b.pt") == ("user/repo", "b.pt", "v1")


class TestPublishedSampling:
    def test_by_name(self):
        found = published_sampling("c2i_XL_256")
        assert found.pop("why") == f"as published for {NPP}'s c2i_XL_256.pt (by name)"
        assert found == {"gpt_model": "GPT-XL", "image_size": 256, "image_size_eval": 256, "cfg_scale": 1.70}
        assert published_sampling("llamagen/c2i_XL_256")["cfg_scale"] == 1.75
        assert published_sampling("c2i_3B_384")["image_size"] == 384

    def test_by_the_record_of_the_download_or_as_a_copy_of_it(self, tmp_path, monkeypatch):
        """A copy is known by the checksums that it lists: nothing is hashed."""
        for name, value in (("other", 1.0), ("mine", 2.0)):
            torch.save({"model": torch.full((1000,), value)}, tmp_path / "archive.pt")
            (tmp_path / "archive.pt").rename(tmp_path / f"{name}.pt")
        downloaded("llamagen/c2i_XL_256", (tmp_path / "mine.pt").read_bytes())
        monkeypatch.setattr(hashlib, "sha256", None)
        for path, how in ((CATALOGUE["llamagen/c2i_XL_256"].path, "by the record"), (tmp_path / "mine.pt", "a copy")):
            found = published_sampling(path)
            assert found["cfg_scale"] == 1.75 and how in found["why"]
        assert published_sampling(tmp_path / "other.pt") == {}

    def test_by_a_file_name_only_what_is_beyond_doubt(self, tmp_path):
        """B and L were drawn with one scale by both projects, XL was not."""
        for name, scale in (("c2i_B_256", 2.0), ("c2i_L_256", 1.75), ("c2i_XL_256", None), ("c2i_L_384", 2.0)):
            (tmp_path / f"{name}.pt").write_bytes(b"")
            found = published_sampling(tmp_path / f"{name}.pt")
            assert found.get("cfg_scale") == scale
            assert found["image_size"] == int(name[-3:]) and "by its file name only" in found["why"]

    def test_nothing_is_known_of_others(self, tmp_path):
        (tmp_path / "0001000.pt").write_bytes(b"")
        (tmp_path / "vq_ds16_c2i.pt").write_bytes(b"")
        for path in (
            tmp_path / "0001000.pt",
            tmp_path / "vq_ds16_c2i.pt",
            tmp_path / "nowhere.pt",
            "vq_ds16_c2i",
            tmp_path,
        ):
            assert published_sampling(path) == {}
