"""What runs on a GPU gives what the CPU gives. Run with ``scripts/test_gpu``."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from fusion.alignment import align, apply_permutation, permutation_spec, random_permutation
from fusion.data import batches, label_space
from fusion.method.presets import algorithm, method_names
from fusion.modelpool import BaseModelPool
from fusion.models import MultiTaskNetwork
from fusion.taskpool import ClassificationTaskPool
from fusion.training import fit, recalibrate_batch_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
NO_MERGES = {
    "custom", "dummy", "merge", "weighted_average", "interpolation_barrier",
    "task_vector_cos_similarity", "task_vector_violin_plot",
}  # fmt: skip


def on(device: str):
    from lightning.fabric import Fabric

    return Fabric(accelerator=device, devices=1)


@pytest.mark.parametrize("method", [name for name in method_names() if name not in NO_MERGES])
def test_a_merge_on_the_gpu_is_that_of_the_cpu(base, peers, train_digits, method) -> None:
    pool = BaseModelPool(
        {"_pretrained_": base, **peers}, train_datasets={"_pretrained_": train_digits}
    )
    found = []
    for device in ("cpu", "gpu"):
        merge = algorithm(method, batch_norm="merge", plot=False)
        merge.fabric = on(device)
        found.append(merge.run(pool))
    one, other = (m.networks[0] if isinstance(m, MultiTaskNetwork) else m for m in found)
    for key, tensor in one.state_dict().items():
        theirs = other.state_dict()[key]
        assert theirs.device.type == "cpu", key
        torch.testing.assert_close(theirs, tensor, rtol=1e-3, atol=1e-4)


def test_statistics_and_scores_agree(base, train_digits, test_digits) -> None:
    import copy

    cpu, gpu = copy.deepcopy(base), copy.deepcopy(base)
    recalibrate_batch_norm(cpu, train_digits, images=300)
    recalibrate_batch_norm(gpu, train_digits, images=300, device="cuda")
    torch.testing.assert_close(gpu.bn1.running_var, cpu.bn1.running_var, rtol=1e-4, atol=1e-5)
    labels = label_space(test_digits)
    scores = []
    for device in ("cpu", "gpu"):
        tasks = ClassificationTaskPool({"digits": test_digits})
        tasks.fabric = on(device)
        scores.append(tasks.evaluate(cpu, labels=labels)["digits"])
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=1e-3)


def test_a_planted_permutation_is_recovered_there(base) -> None:
    spec = permutation_spec(base, torch.zeros(1, 1, 8, 8))
    moved = apply_permutation(base, spec, random_permutation(spec, seed=1))
    found = align(moved, base, spec=spec, device="cuda").model
    for key, tensor in base.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_learns_there(net, train_digits, precision) -> None:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="gpu", devices=1, precision=precision)
    model = net()
    history = fit(model, train_digits, epochs=3, lr=0.01, batch_size=64, fabric=fabric)
    assert history.epochs[-1].train.accuracy > history.epochs[0].train.accuracy
    assert next(model.parameters()).device.type == "cpu"


def test_batches_of_any_data_set_arrive_on_the_device() -> None:
    data = TensorDataset(torch.rand(600, 1, 8, 8), torch.arange(600) % 10)
    images, labels = next(batches(data, batch_size=64, device="cuda", workers=2))
    assert images.device.type == labels.device.type == "cuda"
