"""What keeps batch normalization from giving MoCo's answer away: the key's statistics are not its query's."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization in ``splits`` parts of the batch, as on so many devices without synchronization.

    Parameters, buffers and evaluation are :class:`torch.nn.BatchNorm2d`'s.

    Raises:
        ValueError: in training, a batch that ``splits`` does not divide.
    """

    def __init__(self, num_features: int, splits: int) -> None:
        super().__init__(num_features)
        self.splits = splits

    def forward(self, input: Tensor) -> Tensor:
        """``input`` (N, C, H, W), normalized."""
        if not self.training:
            return super().forward(input)
        rows, _, height, width = input.shape
        if rows % self.splits != 0:
            raise ValueError(f"the batch must be a multiple of bn_splits = {self.splits}, got {rows} images")
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, var = self.running_mean.repeat(self.splits), self.running_var.repeat(self.splits)
        output = nn.functional.batch_norm(
            input.reshape(rows // self.splits, -1, height, width),  # each part becomes channels of its own
            mean,
            var,
            self.weight.repeat(self.splits),
            self.bias.repeat(self.splits),
            training=True,
            momentum=self.momentum or 0.0,
            eps=self.eps,
        )
        self.running_mean.copy_(mean.view(self.splits, -1).mean(0))
        self.running_var.copy_(var.view(self.splits, -1).mean(0))
        return output.view(input.shape)


def split_batch_norm(module: nn.Module, splits: int) -> None:
    """Turn every :class:`torch.nn.BatchNorm2d` inside ``module`` into a :class:`SplitBatchNorm2d`."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            split = SplitBatchNorm2d(child.num_features, splits)
            split.load_state_dict(child.state_dict())
            setattr(module, name, split)
        else:
            split_batch_norm(child, splits)


@torch.no_grad()
def encode_shuffled(encoder: nn.Module, images: Tensor, seed: int) -> Tensor:
    """``encoder(images)``, each image normalized among others than its place in the batch would give it.

    The batch of all ranks, which must be of one size, is put in an order that ``seed`` determines.
    He et al. 2020, https://arxiv.org/abs/1911.05722, section 3.3.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    order = torch.randperm(len(images) * ranks, generator=torch.Generator().manual_seed(seed))
    order = order.to(images.device)
    features = _gather(encoder(_gather(images, ranks)[order.chunk(ranks)[rank]]), ranks)
    return features[order.argsort().chunk(ranks)[rank]]


def _gather(rows: Tensor, ranks: int) -> Tensor:
    if ranks == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(ranks)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
