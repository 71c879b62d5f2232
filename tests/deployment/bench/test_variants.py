import json

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import prunekit
from prunekit.backbones.resnet import resnet
from prunekit.deployment.bench.variants import RUNTIMES, VariantTimer, random_variants
from prunekit.errors import ExportError, PlanError
from prunekit.pruning.graph.groups import find_groups

IMAGES = torch.randn(1, 3, 16, 16)


@pytest.fixture(scope="module")
def network():
    model = resnet(depth=8, width=4).eval()
    return model, find_groups(model, IMAGES)


def test_random_variants_are_from_whole_to_small(network):
    model, groups = network
    variants = random_variants(model, groups, 30)
    widths = {group.id: group.channels for group in groups if group.reason is None}
    assert variants[0] == widths and variants == random_variants(model, groups, 30)
    shares = [sum(kept.values()) / sum(widths.values()) for kept in variants]
    assert min(shares) < 0.4 and len(set(shares)) > 20
    assert all(0 < kept[name] <= widths[name] for kept in variants for name in widths)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_profile_measures_each_runtime(network, runtime):
    model, _ = network
    shares = []
    table = prunekit.profile(model, IMAGES, runtime=runtime, threads=1, variants=3, progress=shares.append)
    assert (table.runtime, table.threads, table.size, table.batch) == (runtime, 1, [3, 16, 16], 1)
    assert len(table.variants) == 3 and all(variant.ms > 0 for variant in table.variants)
    assert shares == sorted(shares) and 0 <= shares[0] < shares[-1] <= 1
    assert type(table).model_validate(json.loads(json.dumps(table.to_json()))) == table


def test_file_of_a_variant_has_its_channels(network, monkeypatch):
    model, groups = network
    # The last candidate is the fastest: it pads no channels.
    monkeypatch.setattr(
        "prunekit.deployment.deploy.time_interleaved", lambda calls, rounds: [-n for n in range(len(calls))]
    )
    timer = VariantTimer(model, groups, IMAGES, "onnxruntime", 1)
    dense, small = (timer.onnx(kept) for kept in (random_variants(model, groups, 1)[0], {"conv": 1}))
    assert len(small) < len(dense)
    session = onnxruntime.InferenceSession(dense, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    np.testing.assert_allclose(output, model(IMAGES).detach().numpy(), atol=1e-4)


def test_unusable_arguments_are_refused(network):
    model, _ = network
    with pytest.raises(ExportError, match="unknown runtime 'tflite'; choose one of onnxruntime, openvino, torch"):
        prunekit.profile(model, IMAGES, runtime="tflite")
    with pytest.raises(PlanError, match="no group of the model can be pruned"):
        prunekit.profile(nn.Sequential(nn.Conv2d(3, 4, 3)), IMAGES)
