"""Checkpoints: ours and the published ones are read, damaged and malicious ones are refused in one line."""

import argparse
import errno
import os
from collections import Counter, defaultdict
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from torch import nn

from utils import checkpoint
from utils.cli import InputError


def weights() -> dict[str, torch.Tensor]:
    return {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.tensor([1.5, -2.0])}


def same(found: dict, expected: dict) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


class Attack:
    """Makes a folder when unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestSave:
    def test_round_trip_with_optimizer_and_plain_data(self, tmp_path):
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        content = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "steps": 7,
            "config": {"dim": 3, "rate": 0.1, "name": "GPT-B", "sides": [2, 1], "none": None},
        }
        checkpoint.save(tmp_path / "new" / "a.pt", content)
        found = checkpoint.load(tmp_path / "new" / "a.pt")
        assert same(checkpoint.state_dict(found), model.state_dict())
        assert (found["steps"], found["config"]) == (7, content["config"])
        torch.optim.AdamW(model.parameters()).load_state_dict(found["optimizer"])

    def test_a_failed_save_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "a.pt"
        checkpoint.save(path, {"model": weights()})
        with pytest.raises(AttributeError):
            checkpoint.save(path, {"model": weights(), "args": lambda: None})
        assert same(checkpoint.load(path)["model"], weights())
        assert list(tmp_path.iterdir()) == [path]


class TestForms:
    @pytest.mark.parametrize("zipped", [True, False])
    def test_published(self, tmp_path, zipped):
        """Pickled with the training command's Namespace; an old rotary table is left out."""
        args = argparse.Namespace(gpt_model="GPT-B", lr=1e-4)
        content = {"model": {**weights(), "freqs_cis": torch.zeros(4)}, "optimizer": {}, "steps": 3, "args": args}
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        found = checkpoint.load(tmp_path / "a.pt")
        assert found["args"] == args
        assert same(checkpoint.state_dict(found), weights())

    @pytest.mark.parametrize("key", ["model", "module", "state_dict", "net", None])
    @pytest.mark.parametrize(
        "prefix",
        ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "gpt.", "model.net."],
    )
    def test_wrappers_are_taken_off(self, key, prefix):
        """DistributedDataParallel and torch.compile, in either order; DeepSpeed's files; bare state dicts."""
        state = {prefix + name: tensor for name, tensor in weights().items()}
        assert same(checkpoint.state_dict({key: state, "steps": 1} if key else state), weights())

    def test_trap_a_wrapper_is_taken_off_the_front_only(self):
        state = {"encoder.module.weight": torch.zeros(1), "module_list.weight": torch.zeros(1)}
        assert same(checkpoint.state_dict({"model": state}), state)

    def test_what_fsdp_and_compiled_blocks_put_inside_names_is_taken_out(self):
        wrapped = {
            "_fsdp_wrapped_module.fc._checkpoint_wrapped_module.weight": weights()["fc.weight"],
            "_fsdp_wrapped_module.fc._orig_mod.bias": weights()["fc.bias"],
        }
        assert same(checkpoint.state_dict({"model": wrapped}), weights())

    def test_auto_is_ema_where_our_files_have_one(self):
        moved = {name: tensor + 1 for name, tensor in weights().items()}
        others = {"model": weights(), "ema": moved, "args": argparse.Namespace()}
        assert same(checkpoint.state_dict(others, "auto"), weights())
        assert same(checkpoint.state_dict({**others, "config": {}, "args": {}}, "auto"), moved)
        for key in checkpoint.AVERAGES:
            assert same(checkpoint.state_dict({"model": None, key: moved}, "auto"), moved)
            with pytest.raises(InputError, match="no weights but EMA weights"):
                checkpoint.state_dict({key: moved})
        assert same(checkpoint.state_dict({"model": weights()}, "auto"), weights())
        assert same(checkpoint.state_dict(weights(), "auto"), weights())

    def test_plain_data_is_told_from_weights_and_training_state(self):
        content = {"model": weights(), "ema": weights(), "optimizer": {}, "scaler": {}, "recent": torch.zeros(2)}
        assert checkpoint.about({**content, "steps": 3, "config": {"dim": 4}}) == {"steps": 3, "config": {"dim": 4}}
        assert checkpoint.about(weights()) == {}

    def test_ema_is_taken_where_it_is_asked_for(self):
        moved = {name: tensor + 1 for name, tensor in weights().items()}
        content = {"model": weights(), "ema": {"module." + name: tensor for name, tensor in moved.items()}}
        assert same(checkpoint.state_dict(content), weights())
        assert same(checkpoint.state_dict(content, "ema"), moved)
        with pytest.raises(InputError, match=r"no EMA weights in this checkpoint \(it holds model, steps\)"):
            checkpoint.state_dict({"model": weights(), "steps": 1}, "ema")
        with pytest.raises(InputError, match="expected model or ema, got best"):
            checkpoint.state_dict(content, "best")

    def test_weights_that_are_none_are_refused(self):
        with pytest.raises(InputError, match="no EMA weights"):
            checkpoint.state_dict({"model": weights(), "ema": None}, "ema")

    def test_computed_buffers_of_others_are_left_out_with_a_note(self, capsys):
        state = {**weights(), "layers.0.causal_mask": torch.ones(2, 2)}
        assert same(checkpoint.state_dict({"model": state}), weights())
        assert "layers.0.causal_mask" in capsys.readouterr().err

    @pytest.mark.parametrize("zipped", [True, False])
    def test_plain_data_of_others_is_read(self, tmp_path, zipped):
        """Numbers and arrays of NumPy, paths (as text), defaultdicts (as dicts), sets."""
        content = {
            "model": weights(),
            "fid": np.float64(3.5),
            "steps": np.int64(7),
            "array": np.arange(4),
            "args": argparse.Namespace(folder=Path("a/b"), windows=PureWindowsPath("c:/d")),
            "meters": defaultdict(list, loss=[1.0]),
            "counts": Counter("aab"),
            "names": {"x"},
        }
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        found = checkpoint.load(tmp_path / "a.pt")
        assert (found["fid"], found["steps"], found["array"].tolist()) == (3.5, 7, [0, 1, 2, 3])
        assert (found["args"].folder, found["args"].windows) == ("a/b", "c:\\d")
        assert type(found["meters"]) is dict and found["meters"] == {"loss": [1.0]}
        assert (found["counts"], found["names"]) == (Counter("aab"), {"x"})


class TestRefusals:
    def test_missing(self, tmp_path):
        with pytest.raises(
            InputError, match=r"there is no checkpoint .*a\.pt; give the path of a \.pt or \.safetensors file"
        ):
            checkpoint.load(tmp_path / "a.pt")
        with pytest.raises(InputError, match=r"holds neither model\.safetensors nor"):
            checkpoint.load(tmp_path)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_truncated_anywhere(self, tmp_path, zipped):
        """In both of torch's file forms: the older one raises six kinds of errors, depending on where it is cut."""
        expected = r"is truncated or not a checkpoint: copy or download it again|is damaged or would run code"
        path = tmp_path / "a.pt"
        torch.save({"model": weights(), "steps": 1}, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for size in range(0, len(whole), 7):
            path.write_bytes(whole[:size])
            with pytest.raises(InputError, match=expected):
                checkpoint.load(path)

    @pytest.mark.parametrize("mmap", [True, False])
    def test_flipped_bits(self, tmp_path, mmap):
        path = tmp_path / "a.pt"
        checkpoint.save(path, {"model": {"w": torch.full((1000,), 1.5)}})
        checkpoint.load(path, mmap)
        content = bytearray(path.read_bytes())
        content[content.index(torch.full((9,), 1.5).numpy().tobytes()) + 400] ^= 1
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.pt is damaged: the bytes of \S*data/0 in it have changed"):
            checkpoint.load(path, mmap)

    def test_a_full_disk(self, tmp_path, monkeypatch):
        def fail(_content, temporary):
            Path(temporary).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

        monkeypatch.setattr(torch, "save", fail)
        with pytest.raises(OSError) as refusal:
            checkpoint.save(tmp_path / "a.pt", {})
        assert (refusal.value.errno, refusal.value.filename) == (errno.ENOSPC, str(tmp_path / "a.pt"))
        assert not list(tmp_path.iterdir())

    def test_values_that_are_not_finite(self):
        others = {"big": torch.full((9,), 3e38), "ids": torch.ones(2).long(), "none": torch.empty(0)}
        checkpoint.check_finite({**weights(), **others, "small": torch.ones(2).to(torch.float8_e4m3fn)}, "a.pt")
        for value in (float("nan"), float("inf")):
            with pytest.raises(InputError, match=r"a\.pt: bad has values that are not finite"):
                checkpoint.check_finite({**weights(), "bad": torch.tensor([1.0, value]).bfloat16()}, "a.pt")

    def test_another_kind_of_file(self, tmp_path):
        """A web page or a Git LFS pointer in place of the weights; torch's advice to read it unsafely is not passed on."""
        path = tmp_path / "a.pt"
        for content in ("<html><body>Not found</body></html>", "version https://git-lfs.github.com/spec/v1\nsize 1\n"):
            path.write_text(content)
            with pytest.raises(InputError, match="not a checkpoint: copy or download it again") as refusal:
                checkpoint.load(path)
            assert "weights_only" not in str(refusal.value) and "\n" not in str(refusal.value)

    def test_not_a_dict(self, tmp_path):
        torch.save([torch.zeros(1)], tmp_path / "a.pt")
        with pytest.raises(InputError, match="holds a list; expected a dict with 'model' or a state dict"):
            checkpoint.load(tmp_path / "a.pt")

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("mmap", [True, False])
    def test_code_in_a_file_is_not_executed(self, tmp_path, zipped, mmap):
        path, target = tmp_path / "a.pt", tmp_path / "attacked"
        content = {"model": weights(), "args": argparse.Namespace(x=Attack(target))}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            InputError, match=r"is not read: it asks for \w+\.mkdir, so it is damaged or would run code"
        ) as refusal:
            checkpoint.load(path, mmap)
        assert not target.exists()
        assert "weights_only" not in str(refusal.value) and "\n" not in str(refusal.value)


class TestMapped:
    def test_values_are_the_same_and_stay_in_the_file(self, tmp_path):
        """In the newer form of .pt files; the older one is read as ever."""
        big = {"weight": torch.arange(1 << 20)}
        for zipped in (True, False):
            torch.save({"model": big}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
            found = checkpoint.load(tmp_path / "a.pt", mmap=True)["model"]
            assert same(found, big)
            mapped = str(tmp_path / "a.pt") in Path("/proc/self/maps").read_text()
            assert mapped == zipped
            del found

    def test_changing_mapped_weights_leaves_the_file_alone(self, tmp_path):
        checkpoint.save(tmp_path / "a.pt", {"model": weights()})
        found = checkpoint.load(tmp_path / "a.pt", mmap=True)["model"]
        found["fc.weight"].add_(1)
        assert same(checkpoint.load(tmp_path / "a.pt")["model"], weights())


class TestSafetensors:
    STATE = {
        "a.weight": torch.arange(600.0).view(20, 30),
        "a.bias": torch.ones(5, dtype=torch.bfloat16),
        "n": torch.zeros(3),
    }
    ABOUT = {"config": {"dim": 3, "levels": [1, 2]}, "gpt_model": "GPT-B", "steps": 7}

    def test_a_file_and_a_folder_are_read_as_checkpoints(self, tmp_path):
        about = {"config": {"dim": 3}, "gpt_model": "GPT-B", "steps": 7, "classes": ["a", "b"]}
        checkpoint.save_safetensors(tmp_path / "a.safetensors", weights(), about)
        checkpoint.save_folder(tmp_path / "folder", weights(), about)
        for source in (tmp_path / "a.safetensors", tmp_path / "folder"):
            found = checkpoint.load(source)
            state = checkpoint.state_dict(found)
            assert same({name: state[name] for name in weights()}, weights()) and len(state) == len(weights())
            assert checkpoint.about(found) == about

    def test_a_truncated_one_is_refused(self, tmp_path):
        checkpoint.save_safetensors(tmp_path / "a.safetensors", weights(), {})
        whole = (tmp_path / "a.safetensors").read_bytes()
        for size in range(0, len(whole), 7):
            (tmp_path / "a.safetensors").write_bytes(whole[:size])
            with pytest.raises(InputError, match=r"is missing, truncated or no safetensors file: copy or download"):
                checkpoint.load(tmp_path / "a.safetensors")

    def test_shards_are_read_as_one(self, tmp_path):
        checkpoint.save_folder(tmp_path, self.STATE, self.ABOUT, shard=1000)
        names = sorted(path.name for path in tmp_path.iterdir())
        assert "model.safetensors.index.json" in names and "model-00002-of-00002.safetensors" in names
        found = checkpoint.load(tmp_path)
        assert {key: found[key] for key in self.ABOUT} == self.ABOUT
        assert found["model"].keys() == self.STATE.keys()
        assert all(found["model"][name].equal(tensor) for name, tensor in self.STATE.items())
        assert found["model"]["a.bias"].dtype == torch.bfloat16

    def test_a_folder_without_our_key(self, tmp_path):
        """Written by others: the whole of config.json is the config."""
        checkpoint.save_folder(tmp_path, self.STATE, {})
        (tmp_path / "config.json").write_text('{"dim": 5}')
        found = checkpoint.load(tmp_path)
        assert found["config"] == {"dim": 5} and set(found) == {"config", "model"}

    def test_a_shard_that_is_missing_or_incomplete(self, tmp_path):
        checkpoint.save_folder(tmp_path, self.STATE, self.ABOUT, shard=1000)
        shard = tmp_path / "model-00002-of-00002.safetensors"
        held = checkpoint.load(shard)["model"]
        checkpoint.save_safetensors(shard, {"other": torch.zeros(1)}, {})
        with pytest.raises(InputError, match=f"lacks {next(iter(held))}"):
            checkpoint.load(tmp_path)
        shard.unlink()
        with pytest.raises(InputError, match=rf"{shard.name} \(0 bytes\) is missing"):
            checkpoint.load(tmp_path)

    def test_an_index_does_not_lead_out_of_its_folder(self, tmp_path):
        (tmp_path / "in").mkdir()
        checkpoint.save_safetensors(tmp_path / "x.safetensors", self.STATE, {})
        (tmp_path / "in" / "model.safetensors.index.json").write_text('{"weight_map": {"n": "../x.safetensors"}}')
        with pytest.raises(InputError, match="names a file outside its folder"):
            checkpoint.load(tmp_path / "in")

    def test_wrong_folders(self, tmp_path):
        with pytest.raises(InputError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
            checkpoint.load(tmp_path)
        (tmp_path / "config.json").write_text("[1")
        with pytest.raises(InputError, match=r"config\.json is not valid JSON"):
            checkpoint.load(tmp_path)


class TestDescribe:
    def test_source_size_dtype_kind_and_steps(self):
        content = {"model": weights(), "ema": weights(), "steps": 12, "config": {}, "args": {}}
        line = checkpoint.describe("a.pt", content, "auto", weights())
        assert line == "a.pt: 0.0M parameters, float32, EMA weights, 12 steps"
        half = {name: tensor.half() for name, tensor in weights().items()} | {"codebook_used": torch.zeros(1000000)}
        assert checkpoint.describe("a.pt", half, "auto", half) == "a.pt: 0.0M parameters, float16, raw weights"
        both = {**half, "fc.bias": weights()["fc.bias"]}
        assert "float16/float32" in checkpoint.describe("a.pt", both, "auto", both)


class TestFit:
    def test_the_first_mismatches_are_named(self):
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
        state = {"0.weight": torch.zeros(2, 5), "0.bias": torch.zeros(2), "extra": torch.zeros(1)}
        with pytest.raises(InputError) as refusal:
            checkpoint.load_weights(model, state, "a.pt (as GPT-B)")
        assert str(refusal.value) == (
            "a.pt (as GPT-B) does not fit this model: 0.weight is (2, 5), the model has (2, 3); 1.weight is missing; "
            "1.bias is missing and 1 more"
        )

    def test_nothing_is_loaded_from_weights_that_do_not_fit(self):
        model = nn.Linear(3, 2)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(InputError, match="more is not in the model"):
            checkpoint.load_weights(model, {**before, "weight": torch.ones(2, 3), "more": torch.zeros(1)}, "a.pt")
        assert same(model.state_dict(), before)
