"""What is lost when a merge sees cards instead of images, and does a joint head from cards help?

    python scripts/cards_table.py                     # digits_tasks: with images and from cards
    python scripts/cards_table.py --joint             # one head for ten digits, from two experts
    python scripts/cards_table.py --sizes             # how large a card is

The first table has the mean accuracy of four tasks as a share of the experts', in percent; the
second the accuracy among ten classes. Each expert's card and each merge that looks at images see
the same 500 training images of it. Mean and standard error over seeds; test images are looked at
once. Pools of the second table: two experts of five digits each, fine-tuned from one base that
knows rotations only (``rotations``) or was trained on all ten digits for three epochs (``digits``),
or trained apart from different initialisations and aligned by weights (``apart``).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pools import settings
from torch import nn
from torchvision.models import resnet18

import fusion
from fusion.data import ImageTensors, batches, digits
from fusion.labels import LabelSpace
from fusion.merging.alignment import AlignmentStage
from fusion.merging.joint_head import RIDGE, ClassStatistics, solve_head
from fusion.merging.members import Members
from fusion.merging.statistics import collect, gather
from fusion.modelpool import BaseModelPool
from fusion.models import CifarResNet, find_layers
from fusion.target import build
from fusion.taskpool import ClassificationTaskPool, Contestant, Ensemble
from fusion.weights import load_tensors

FOLDED = {"folded": True}
CLASSES = {"low": [0, 1, 2, 3, 4], "high": [5, 6, 7, 8, 9]}
TEN = LabelSpace.of(list(map(str, range(10))))
BASES = {"rotations": 8, "digits": 3}  # epochs
RIDGES = (0.001, 0.01, 0.03, 0.1, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--joint", action="store_true", help="the table of joint heads")
    parser.add_argument("--ridges", action="store_true", help="joint heads by ridge, on validation")
    parser.add_argument("--sizes", action="store_true", help="the sizes of cards")
    arguments = parser.parse_args()
    if arguments.sizes:
        sizes()
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            if arguments.ridges:
                rows += by_ridge(seed)
            elif arguments.joint:
                rows += joint(seed, Path(folder) / str(seed))
            else:
                rows += tasks(seed, Path(folder) / str(seed))
    frame = pd.DataFrame(rows)
    print("| pool | method | % |\n|---|---|---|")
    for (pool, name), found in frame.groupby(["pool", "method"], sort=False)["score"]:
        print(f"| {pool} | {name} | {found.mean():.1f} ± {found.sem():.1f} |")


def with_cards(pool: BaseModelPool, folder: Path) -> BaseModelPool:
    """Return the pool with a card for each expert, and without an image."""
    cards = {
        name: fusion.write_card(pool, name, folder / f"{name}.card.safetensors", progress=False)
        for name in pool
    }
    models = {name: pool.load_model(name) for name in pool.all_model_names}
    known = {name: pool.labels(name) for name in models}
    classes = {n: list(space.names or space.labels) for n, space in known.items() if space}
    return BaseModelPool(models, cards=cards, classes=classes)  # type: ignore[arg-type]


def tasks(seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    values = settings("digits_tasks", seed, [])
    pool: BaseModelPool = build(values["modelpool"])
    measure: ClassificationTaskPool = build(values["taskpool"])
    from_cards = with_cards(pool, folder)
    own = {
        name: measure.evaluate(pool.load_model(name), labels=pool.labels(name))[name]["accuracy"]
        for name in pool
    }

    def score(network: nn.Module) -> float:
        found = measure.evaluate_all({"m": Contestant(lambda: network)})["m"]
        return 100 * sum(found[task]["accuracy"] / own[task] for task in own) / len(own)

    def merged(given: BaseModelPool, method: str, **options: Any) -> float:
        return score(fusion.merge(given, method, head="tasks", plot=False, **options))

    keep: dict[str, Any] = {"batch_norm": "merge"}
    found: dict[str, Callable[[], float]] = {
        "average, images, recalibrated": lambda: merged(pool, "simple_average"),
        "average, no images, statistics merged": lambda: merged(pool, "simple_average", **keep),
        "average, cards": lambda: merged(from_cards, "simple_average"),
        "task arithmetic 0.3, images, recalibrated": lambda: merged(pool, "task_arithmetic"),
        "task arithmetic 0.3, no images, statistics merged": (
            lambda: merged(pool, "task_arithmetic", **keep)
        ),
        "task arithmetic 0.3, cards": lambda: merged(from_cards, "task_arithmetic"),
        "regmean, images, recalibrated": lambda: merged(pool, "regmean"),
        "regmean, cards": lambda: merged(from_cards, "regmean"),
        "regmean folded, images, recalibrated": lambda: merged(pool, "regmean", **FOLDED),
        "regmean folded, images": lambda: merged(pool, "regmean", **FOLDED, **keep),
        "regmean folded, cards": lambda: merged(from_cards, "regmean", **FOLDED),
    }
    for name, make in found.items():
        yield {"pool": "digits_tasks", "method": name, "score": make()}


def split_pools(seed: int) -> Iterator[tuple[str, BaseModelPool]]:
    """Yield pools of two experts of five digits each."""
    values = settings("digits_split", seed, [])["modelpool"]
    data = values["train_datasets"]
    cache = values["models"]["low"]["cache_dir"]
    everything = data["low"]["dataset"]
    turned = {"_target_": "fusion.data.quarter_turns", "dataset": everything, "seed": seed}
    recipe = {"_target_": "fusion.modelpool.TrainedModel", "batch_size": 64, "seed": seed}
    recipe["cache_dir"] = cache
    for kind, epochs in BASES.items():
        start = turned if kind == "rotations" else everything
        models = {
            "_pretrained_": {
                **recipe,
                "architecture": network(4 if kind == "rotations" else 10),
                "dataset": start,
                "epochs": epochs,
                "lr": 0.01,
            }
        }
        for name in CLASSES:
            models[name] = {
                **recipe,
                "architecture": network(5),
                "dataset": data[name],
                "init_from": "_pretrained_",
                "epochs": 8,
                "lr": 0.005,
            }
        yield kind, BaseModelPool(models, train_datasets=data)
    apart: BaseModelPool = build(values)
    members, _ = AlignmentStage("weights").run(Members.read(apart), apart, device="cpu")
    aligned: dict[str, nn.Module] = {}
    for name in apart:
        aligned[name] = apart.load_model(name)
        load_tensors(aligned[name], members.experts[name])
    yield "apart", BaseModelPool(aligned, train_datasets=data)


def network(outputs: int) -> dict[str, Any]:
    return {
        "_target_": "fusion.models.CifarResNet",
        "depth": 8,
        "num_classes": outputs,
        "in_channels": 1,
        "width": 1,
    }


def joint(seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    images = digits("test")
    for kind, pool in split_pools(seed):
        from_cards = with_cards(pool, folder / kind)
        ensemble = Ensemble(
            {name: pool.load_model(name) for name in pool},
            {name: pool.labels(name) for name in pool},
            {name: name for name in pool},
        )
        yield row(kind, "ensemble of the experts", accuracy(ensemble, None, images))
        for method, options in {
            "simple_average": {},
            "regmean": FOLDED,
        }.items():

            def merged(
                head: str,
                given: BaseModelPool = from_cards,
                method: str = method,
                options: Mapping[str, Any] = options,
            ) -> nn.Module:
                return fusion.merge(given, method, head=head, plot=False, **options)

            yield row(kind, f"{method}, a head per task", accuracy(merged("tasks"), None, images))
            result = merged("joint")
            yield row(kind, f"{method}, union of rows", accuracy(merged("union"), TEN, images))
            yield row(kind, f"{method}, joint head from cards", accuracy(result, TEN, images))
            # The owners write cards of the merged network: the head is then that of all images.
            second = BaseModelPool(
                dict.fromkeys(pool, result),
                train_datasets={name: pool.dataset(name) for name in pool},
                classes={name: list(map(str, range(10))) for name in pool},
            )
            again = with_cards(second, folder / kind / method)
            refit = fusion.merge(again, "simple_average", head="joint", batch_norm="merge")
            name = f"{method}, joint head from cards of the second round"
            yield row(kind, name, accuracy(refit, TEN, images))
            name = f"{method}, head refit on all images"
            yield row(kind, name, accuracy(refitted(result), TEN, images))


def refitted(model: nn.Module) -> nn.Module:
    """Return the network with the least-squares head of all training images together."""
    layers = [layer for layer in find_layers(model) if layer.name == "linear"]
    shown = batches(digits("train"), batch_size=500)
    found = collect(model, shown, ("gram", "classes"), layers=layers)["linear.weight"]
    weight, bias = solve_head(
        [ClassStatistics(found["gram"][0], found["classes"], TEN)], TEN, ridge=RIDGE
    )
    load_tensors(model, {"linear.weight": weight, "linear.bias": bias})  # type: ignore[dict-item]
    return model


def by_ridge(seed: int) -> Iterator[dict[str, Any]]:
    """Yield the accuracy of joint heads on validation images, by ridge."""
    images = digits("val")
    for kind, pool in split_pools(seed):
        members = Members.read(pool)
        layer = next(layer for layer in members.layers if layer.name == "linear")
        found = gather(pool, members, ("gram", "classes"), layers=[layer])
        experts = [
            ClassStatistics(gram[0], classes, pool.labels(name))  # type: ignore[arg-type,index]
            for name, gram, classes in zip(
                pool,
                found.each("gram", layer.weight),
                found.each("classes", layer.weight),
                strict=True,
            )
        ]
        for method, options in {"simple_average": {}, "regmean": FOLDED}.items():
            model = fusion.merge(
                pool, method, head="joint", batch_norm="grams", plot=False, **options
            )
            for ridge in RIDGES:
                weight, bias = solve_head(experts, TEN, ridge=ridge)
                load_tensors(model, {"linear.weight": weight, "linear.bias": bias})  # type: ignore[dict-item]
                yield row(kind, f"{method}, ridge {ridge}", accuracy(model, TEN, images))


def row(pool: str, method: str, score: float) -> dict[str, Any]:
    return {"pool": pool, "method": method, "score": score}


def accuracy(model: nn.Module, labels: LabelSpace | None, images: ImageTensors) -> float:
    """Return the accuracy among ten classes, in percent."""
    pool = ClassificationTaskPool(
        {
            name: build(
                {"_target_": "fusion.data.ClassSubset", "dataset": images, "classes": classes}
            )
            for name, classes in CLASSES.items()
        }
    )
    found = pool.evaluate_all({"m": Contestant(lambda: model, labels)})["m"]
    return 100 * float(found["joint"]["accuracy"])


def sizes() -> None:
    for name, made in {
        "ResNet-8": CifarResNet(8, 10),
        "ResNet-20": CifarResNet(20, 10),
        "ResNet-18": resnet18(num_classes=10),
    }.items():
        names = [str(number) for number in range(8)]
        data = ImageTensors(torch.rand(8, 3, 32, 32), torch.arange(8), class_names=names)
        pool = BaseModelPool(
            {"a": made.eval()}, train_datasets={"a": data}, classes={"a": list(range(10))}
        )
        with tempfile.TemporaryDirectory() as folder:
            path = fusion.write_card(pool, "a", Path(folder) / "a.card.safetensors")
            weights = sum(t.nbytes for t in made.state_dict().values())
            print(
                f"{name}: card {path.stat().st_size / 2**20:.1f} MiB, weights {weights / 2**20:.1f}"
            )


if __name__ == "__main__":
    main()
