"""Small models for the tests of the samplers and the demo."""

import io
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

import pytest

from autoregressive.models.gpt import Transformer, preset
from tokenizer.tokenizer_image import vq_model
from utils import checkpoint, cli
from utils.testing import assert_refused, fill_by_formula


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """A tokenizer and a GPT of 4x4 codes and three classes, as the stages before write them."""
    root = tmp_path_factory.mktemp("models")
    vq = vq_model.preset("VQ-4-small", codebook_size=60)
    tokenizer = fill_by_formula(vq_model.VQModel(vq))
    checkpoint.save(root / "vq.pt", {"model": tokenizer.state_dict(), "config": asdict(vq), "vq_model": "VQ-4-small"})
    config = preset("GPT-XXS", vocab_size=60, num_classes=3, block_size=16)
    content = {"config": asdict(config), "args": {}, "gpt_model": "GPT-XXS", "image_size": 16}
    gpt = fill_by_formula(Transformer(config))
    ema = {name: value * 0.5 for name, value in gpt.state_dict().items()}
    checkpoint.save(
        root / "gpt.pt", {**content, "classes": ["ant", "bee", "cat"], "model": gpt.state_dict(), "ema": ema}
    )
    return {"vq": root / "vq.pt", "gpt": root / "gpt.pt"}


@pytest.fixture
def refused() -> Callable[..., None]:
    """Asserts that a command, run in this process as its entry point does, ends with one line that has these parts."""

    def check(main: Callable[[], None], flags: Sequence[object], *parts: str) -> None:
        error = io.StringIO()
        with (
            patch.object(sys, "argv", [main.__module__, *map(str, flags)]),
            redirect_stderr(error),
            pytest.raises(SystemExit) as stopped,
        ):
            cli.run(main)
        assert_refused(CompletedProcess(sys.argv, stopped.value.code, "", error.getvalue()), *parts)

    return check
