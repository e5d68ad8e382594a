"""Training on fewer easy images at the same expected gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.util import UserError


class InfoBatch(nn.Module):
    """Leaves most of the easy images out of a batch and lets the others count for them.

    "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning" (Qin et al. 2024, section 3.2): an image
    whose loss was low when it was last trained on is left out with probability r; those that stay count 1 / (1 - r)
    times, so that the gradient is the same on average. Near the end of the run nothing is left out. Here a fixed share
    of each batch, and not what lies below the mean, is called easy: all batches keep the same size.

    Args:
        easy: share of a batch that is called easy, in (0, 1).
        keep: share of the easy images that are trained on all the same, in (0, 1); 1 - r of the paper.
        until: share of the run after which nothing is left out, in [0, 1].

    Raises:
        ValueError: a share out of its range.
    """

    def __init__(self, easy: float = 2 / 3, keep: float = 0.5, until: float = 0.875) -> None:
        super().__init__()
        for name, share in (("easy", easy), ("keep", keep)):
            if not 0 < share < 1:
                raise ValueError(f"got {name}={share}, expected a share between 0 and 1")
        if not 0 <= until <= 1:
            raise ValueError(f"got until={until}, expected a share from 0 to 1")
        self.easy, self.keep, self.until = easy, keep, until
        self.losses = torch.zeros(0)  # of each image when it was last trained on; inf before

    def get_extra_state(self) -> Tensor:
        return self.losses

    def set_extra_state(self, state: Tensor) -> None:
        self.losses = state.cpu()

    def choose(self, batch: dict[str, Any], progress: float) -> dict[str, Any]:
        """What is trained on of a batch whose `index` int64 [B] says which images it holds.

        Its tensors [B, ...] become [K, ...], and `weight` float32 [K] is added, whose sum is B. `progress` is the share
        of the run that is over.

        Raises:
            UserError: a batch without `index`.
        """
        if "index" not in batch:
            raise UserError(
                f"model.params.prune_config has to know which images a batch holds, and this data set gives only "
                f"{sorted(batch)}: leave prune_config out, or add a key 'index', the image's place in the data set"
            )
        index = batch["index"].cpu()
        self._hold(int(index.max()) + 1)
        easy = round(len(index) * self.easy) if progress < self.until else 0
        kept = max(1, round(easy * self.keep)) if easy else 0
        order = self.losses[index].argsort(stable=True)
        chosen = torch.cat([order[:easy][torch.randperm(easy)[:kept]], order[easy:]])
        weight = torch.ones(len(chosen))
        weight[:kept] = easy / max(1, kept)
        chosen, weight = chosen.to(batch["index"].device), weight.to(batch["index"].device)
        return {**{key: _rows(value, chosen, len(index)) for key, value in batch.items()}, "weight": weight}

    def mean(self, losses: Tensor, chosen: dict[str, Any]) -> Tensor:
        """Losses [K] of the images that were chosen -> the mean over the whole batch as they estimate it, scalar."""
        self.losses[chosen["index"].cpu()] = losses.detach().float().cpu()
        return (losses * chosen["weight"]).sum() / chosen["weight"].sum()

    def _hold(self, size: int) -> None:
        if size > len(self.losses):
            fresh = torch.full((size - len(self.losses),), torch.inf)
            self.losses = torch.cat([self.losses, fresh])


def _rows(value: Any, chosen: Tensor, size: int) -> Any:
    """The chosen ones of `size` rows of a tensor or of as many entries of a list; anything else as it is."""
    if isinstance(value, Tensor) and value.shape[:1] == (size,):
        return value[chosen.to(value.device)]
    if isinstance(value, list) and len(value) == size:
        return [value[i] for i in chosen.tolist()]
    return value
