"""Checkpoints: ours and the published ones are read, damaged and malicious ones are refused in one line."""

import argparse
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from utils import checkpoint
from utils import weights as safetensors
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

    @pytest.mark.parametrize("key", ["model", "module", "state_dict", None])
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
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

    def test_auto_is_ema_where_there_is_one(self):
        moved = {name: tensor + 1 for name, tensor in weights().items()}
        assert same(checkpoint.state_dict({"model": weights(), "ema": moved}, "auto"), moved)
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
        with pytest.raises(InputError, match="weights are a NoneType; expected a dict"):
            checkpoint.state_dict({"model": weights(), "ema": None}, "ema")


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
    def test_a_file_and_a_folder_are_read_as_checkpoints(self, tmp_path):
        about = {"config": {"dim": 3}, "gpt_model": "GPT-B", "steps": 7, "classes": ["a", "b"]}
        safetensors.write_file(tmp_path / "a.safetensors", weights(), about)
        safetensors.write_folder(tmp_path / "folder", weights(), about, "# card")
        for source in (tmp_path / "a.safetensors", tmp_path / "folder"):
            found = checkpoint.load(source)
            state = checkpoint.state_dict(found)
            assert same({name: state[name] for name in weights()}, weights()) and len(state) == len(weights())
            assert checkpoint.about(found) == about

    def test_a_truncated_one_is_refused(self, tmp_path):
        safetensors.write_file(tmp_path / "a.safetensors", weights(), {})
        whole = (tmp_path / "a.safetensors").read_bytes()
        for size in range(0, len(whole), 7):
            (tmp_path / "a.safetensors").write_bytes(whole[:size])
            with pytest.raises(InputError, match=r"is missing, truncated or no safetensors file: copy or download"):
                checkpoint.load(tmp_path / "a.safetensors")


class TestDescribe:
    def test_source_size_dtype_kind_and_steps(self):
        content = {"model": weights(), "ema": weights(), "steps": 12}
        line = checkpoint.describe("a.pt", content, "auto", weights())
        assert line == "a.pt: 0.0M parameters, float32, EMA weights, 12 steps"
        half = {name: tensor.half() for name, tensor in weights().items()} | {"codebook_used": torch.zeros(1000000)}
        assert checkpoint.describe("a.pt", half, "auto", half) == "a.pt: 0.0M parameters, float16, raw weights"
        both = {**half, "fc.bias": weights()["fc.bias"]}
        assert "float16/float32" in checkpoint.describe("a.pt", both, "auto", both)


class TestAdopt:
    def test_the_model_has_the_files_own_tensors(self):
        state = weights()
        with torch.device("meta"):
            model = nn.ModuleDict({"fc": nn.Linear(3, 2)})
        checkpoint.adopt_weights(model, state)
        assert model["fc"].weight.data_ptr() == state["fc.weight"].data_ptr()
        assert model["fc"].weight.requires_grad

    def test_one_dtype(self):
        for given, asked, expected in (
            ("bias", None, "float32"),
            ("both", None, "bfloat16"),
            ("both", "float32", "float32"),
        ):
            with torch.device("meta"):
                model = nn.Linear(3, 2)
            state = {"weight": torch.ones(2, 3, dtype=torch.bfloat16), "bias": torch.ones(2)}
            if given == "both":
                state["bias"] = state["bias"].bfloat16()
            checkpoint.adopt_weights(model, state, getattr(torch, asked) if asked else None)
            assert {str(p.dtype) for p in model.parameters()} == {f"torch.{expected}"}


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
