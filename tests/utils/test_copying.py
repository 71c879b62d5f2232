import copy
from collections import OrderedDict

import torch
from torch import nn

from prunekit.utils.copying import copy_module, restored


def test_copies_share_nothing_and_hooks_are_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[0].cache, model[1].cache = (shared := OrderedDict()), shared
    called = []
    model[1].register_forward_hook(lambda *_: called.append(1))
    copied = copy_module(model)
    copied[0].register_forward_hook(lambda *_: called.append(2))
    copied[0].cache["a"] = 1
    assert copied[1].cache == {"a": 1} and not shared and not model[0]._forward_hooks
    copied.register_buffer("more", torch.zeros(1))
    assert not model._buffers
    copied(torch.ones(1, 3, 2, 2))
    assert called == [2, 1]
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(model, copy.deepcopy(model), strict=True))


def test_values_in_the_memo_are_used():
    model = nn.Linear(2, 2)
    weight = nn.Parameter(torch.zeros(2, 2))
    copied = copy_module(model, {id(model.weight): weight})
    assert copied.weight is weight and copied.bias is not model.bias


def test_what_forward_changes_is_undone():
    model = nn.Sequential(nn.BatchNorm1d(3), torch.jit.script(nn.Linear(3, 3)))
    with restored(model):
        model(torch.randn(4, 3))
        model.eval().cache = 1
        model[0].running_mean = torch.zeros(2)
    assert model.training and model[1].training and not hasattr(model, "cache")
    assert torch.equal(model[0].running_mean, torch.zeros(3)) and model[0].num_batches_tracked == 0


class Compiled(nn.Sequential):
    """Looks into what it contains when it is copied, as torch.fx.GraphModule does."""

    def __deepcopy__(self, memo):
        copied = Compiled(*(copy.deepcopy(module, memo) for module in self))
        assert len(list(copied.named_buffers())) == 3
        return copied


def test_classes_with_a_copy_of_their_own_find_their_modules_whole():
    norm = nn.BatchNorm2d(4)
    model = nn.ModuleList([nn.Sequential(Compiled(norm)), norm])
    copied = copy_module(model)
    assert copied[0][0][0] is copied[1] is not norm
