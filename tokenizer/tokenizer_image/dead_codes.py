"""Codebook entries that no image uses any more begin anew at latents of the current batch (as in Jukebox, arXiv 2005.00341)."""

import numpy as np
import torch
from torch import Tensor

from tokenizer.tokenizer_image.vq_model import VQModel
from utils import streams


class DeadCodes:
    """Which entries were used since the last restart."""

    def __init__(self, codebook_size: int, device: torch.device) -> None:
        self.seen = torch.zeros(codebook_size, dtype=torch.bool, device=device)

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": self.seen.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.seen.copy_(state["seen"])

    def note(self, codes: Tensor) -> None:
        self.seen[codes.flatten()] = True

    @torch.no_grad()
    def restart(
        self,
        model: VQModel,
        ema: VQModel | None,
        optimizer: torch.optim.Optimizer,
        latents_BDHW: Tensor,
        seed: int,
        step: int,
    ) -> None:
        """Move unused entries to random latents, in the EMA too, and forget their moments."""
        dead = (~self.seen).nonzero()[:, 0]
        self.seen.zero_()
        rows_ND = model.quantize.rows(latents_BDHW).flatten(0, 2)
        draws = streams.uniform(seed, streams.AUGMENT, step, np.arange(len(dead)))
        chosen = torch.from_numpy((draws * len(rows_ND)).astype(np.int64)).to(rows_ND.device)
        weight = model.quantize.embedding.weight
        weight[dead] = rows_ND[chosen]
        if ema:
            ema.quantize.embedding.weight[dead] = rows_ND[chosen]
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[weight][moment][dead] = 0
