"""Dense models whose norms leave out dead channels, written without the code that is tested."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from prunekit.pruning.surgery.masked_statistics import mask_statistics


class LeftOut(nn.Module):
    """A LayerNorm or GroupNorm over the channels that are not dead; the others come out as zero."""

    def __init__(self, norm, dead):
        super().__init__()
        self.norm, self.kept = norm, ~torch.from_numpy(dead)

    def forward(self, x):
        norm, kept = self.norm, self.kept
        if isinstance(norm, nn.LayerNorm):
            number = kept.sum()
            mean = (x * kept).sum(-1, keepdim=True) / number
            variance = ((x - mean).square() * kept).sum(-1, keepdim=True) / number
            return ((x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias) * kept
        result = torch.zeros_like(x)
        result[:, kept] = F.group_norm(x[:, kept], norm.num_groups, norm.weight[kept], norm.bias[kept], norm.eps)
        return result


def leave_out(model, groups, dead):
    """Return a copy of a model whose norms leave out the dead channels of groups."""
    masks = {}
    for group in groups:
        channels = np.array(sorted(dead.get(group.id, ())), int)
        for member in group.members if len(channels) else ():
            module = model.get_submodule(member.module)
            if isinstance(module, nn.LayerNorm | nn.GroupNorm) and member.tensor.endswith(".weight"):
                mask = masks.setdefault(member.module, np.zeros(len(module.weight), bool))
                mask[member.entries(channels)] = True
    copied = copy.deepcopy(model)
    for name, mask in masks.items():
        parent, _, key = name.rpartition(".")
        setattr(copied.get_submodule(parent), key, LeftOut(copied.get_submodule(name), mask))
    others = [
        group.model_copy(update={"statistics": [s for s in group.statistics if s.module not in masks]})
        for group in groups
    ]
    return mask_statistics(copied, others, dead)
