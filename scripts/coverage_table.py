"""How many of the parameters of convolutional networks lie on a permutable axis, by family.

    python scripts/coverage_table.py [--families timm,video] [--only NAME] [--output coverage]

For one or more small members of each family: the symmetries that `permutation_spec` finds, the
relative change of the output under a random permutation (float64, a batch of two, every norm and
bias randomised), and whether a planted permuted copy comes back bit for bit (of networks of up to
`--recover` million parameters: the search takes minutes for the largest). Every network runs in a
process of its own with a time limit, so that memory stays bounded. Rows that already stand in the
CSV file are not measured again: delete them (or the file) to do so. `timm` and
`segmentation_models_pytorch` are needed by the families that take networks from them only.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from coverage_networks import FAMILIES, Network

TIME_LIMIT = 300  # seconds for one network
RECOVER = 15.0  # million parameters up to which a planted copy is searched for
LIBRARIES = ("torch", "torchvision", "timm", "segmentation_models_pytorch")
COLUMNS = (
    "family", "network", "parameters (M)", "groups", "units", "coverage", "output error",
    "recovered", "spec (s)", "align (s)", "remark",
)  # fmt: skip
KEY = ("family", "network")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--families", default=",".join(FAMILIES), help=f"of {', '.join(FAMILIES)}; default: all"
    )
    parser.add_argument("--only", metavar="NAME", help="one network, or all that start like it")
    parser.add_argument(
        "--output", type=Path, default=Path("coverage"), help="writes OUTPUT.csv and OUTPUT.md"
    )
    parser.add_argument("--limit", type=int, default=TIME_LIMIT, help="seconds for one network")
    parser.add_argument(
        "--recover", type=float, default=RECOVER, help="largest network (M) that is recovered"
    )
    arguments = parser.parse_args()
    chosen = arguments.families.split(",")
    unknown = sorted(set(chosen) - set(FAMILIES))
    if unknown:
        parser.error(f"no family '{unknown[0]}'; there are {', '.join(FAMILIES)}")
    limits = arguments.limit, arguments.recover
    rows = survey(chosen, arguments.only, arguments.output.with_suffix(".csv"), limits)
    table = markdown(rows)
    arguments.output.with_suffix(".md").write_text(table)
    print(table)


def survey(
    chosen: list[str], only: str | None, path: Path, limits: tuple[int, float]
) -> list[dict[str, str]]:
    """Measure what is not in the CSV file yet, and return all rows of the families chosen."""
    for library in LIBRARIES:  # once, for all networks: they run in copies of this process
        if importlib.util.find_spec(library) is not None:
            importlib.import_module(library)
    rows = read(path)
    for family in chosen:
        for name in FAMILIES[family]:
            key = (family, name)
            if key in rows or (only is not None and not name.startswith(only)):
                continue
            rows[key] = in_child(family, name, *limits)
            print(" ".join(rows[key].values()), file=sys.stderr, flush=True)
            write(path, rows)  # after each network: a survey that is interrupted goes on
    order = {(family, name): None for family in FAMILIES for name in FAMILIES[family]}
    return [
        rows[key]
        for key in order
        if key in rows and key[0] in chosen and (only is None or key[1].startswith(only))
    ]


def read(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {(row["family"], row["network"]): row for row in csv.DictReader(file)}


def write(path: Path, rows: dict[tuple[str, str], dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows.values())


def in_child(family: str, name: str, limit: int, recover: float) -> dict[str, str]:
    """Measure one network in a process of its own; keep what it found before the time limit."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=send, args=(writer, family, name, recover))
    child.start()
    writer.close()
    found: dict[str, Any] = {"remark": "its process was killed"}
    deadline = time.monotonic() + limit
    try:
        while reader.poll(max(deadline - time.monotonic(), 0)):
            found = reader.recv()
    except EOFError:
        pass  # the child has ended
    else:
        child.kill()
        found["remark"] = f"stopped after {limit} s"
    child.join()
    row = {"family": family, "network": name, **found}
    return {column: str(row.get(column, "")) for column in COLUMNS}


# -- one network, in the child ---------------------------------------------------------------------


def send(writer: Connection, family: str, name: str, recover: float) -> None:
    """Send the columns of one network each time that there are more of them."""
    row: dict[str, Any] = {}
    try:
        for row in measure(family, FAMILIES[family][name], recover):
            writer.send(row)
    except Exception as error:  # the survey goes on, and the table says what happened
        first = (str(error).splitlines() or [""])[0]
        writer.send({**row, "remark": f"failed: {type(error).__name__}: {first}"})
        raise
    writer.close()


def measure(family: str, network: Network, recover: float) -> Iterator[dict[str, Any]]:
    """Yield the columns of one network: the spec's, those of the function, of the recovery."""
    import torch

    from fusion.alignment import align, apply_permutation, permutation_spec, random_permutation
    from fusion.errors import UserError

    # What a forward pass makes is in float64, too, and stays so.
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    try:
        torch.manual_seed(0)
        wide = network.build().eval()
    except ModuleNotFoundError as error:
        yield {"remark": f"the family {family} needs {error.name}: pip install {error.name}"}
        return
    parameters = sum(p.numel() for p in wide.parameters()) / 1e6
    row: dict[str, Any] = {"parameters (M)": round(parameters, 2)}
    torch.manual_seed(1)
    inputs = tuple(torch.randn(2, *shape, dtype=torch.float64) for shape in network.shapes)
    calibrate(wide, network, inputs)
    options = {} if network.forward is None else {"forward": network.forward}
    start = time.perf_counter()
    try:
        spec = permutation_spec(wide, tuple(x[:1] for x in inputs), **options)
    except UserError as error:
        seconds = round(time.perf_counter() - start, 2)
        yield {**row, "coverage": 0, "spec (s)": seconds, "remark": f"not traceable: {error}"}
        return
    row["spec (s)"] = round(time.perf_counter() - start, 2)
    row["groups"] = len(spec.groups)
    row["units"] = sum(group.size for group in spec.groups)
    row["coverage"] = round(spec.coverage, 5)
    row["remark"] = reasons(spec)
    yield row

    planted = random_permutation(spec, 1)
    expected = outputs(network, wide, inputs)
    got = outputs(network, apply_permutation(wide, spec, planted), inputs)
    error = max(
        float((a - b).norm() / a.norm().clamp(min=1e-300))
        for a, b in zip(expected, got, strict=True)
    )
    row["output error"] = f"{error:.1e}"
    yield row
    del expected, got
    if parameters > recover:
        return
    reference = wide.to(torch.float32)
    other = apply_permutation(reference, spec, planted)
    start = time.perf_counter()
    found = align(other, reference, spec=spec).model
    row["align (s)"] = round(time.perf_counter() - start, 2)
    pairs = zip(reference.state_dict().values(), found.state_dict().values(), strict=True)
    row["recovered"] = "yes" if all(torch.equal(a, b) for a, b in pairs) else "no"
    yield row


def calibrate(model: Any, network: Network, inputs: tuple[Any, ...]) -> None:
    """Randomise every norm, bias and per-channel scale, so that no two units look alike."""
    import torch

    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.copy_(torch.rand_like(p))  # positive: few units are dead after a ReLU
            elif p.numel() == max(p.shape, default=1):
                p.copy_(0.5 + torch.rand_like(p))

    def off_by_half(norm: Any, arguments: tuple[Any, ...]) -> None:
        x = arguments[0]
        axes = [axis for axis in range(x.ndim) if axis != 1]
        var, mean = torch.var_mean(x, dim=axes, correction=0)
        var = var.clamp(min=float(var.mean()))  # of two values it can be next to nothing
        norm.running_mean = mean + var.sqrt() * (torch.rand_like(mean) - 0.5)
        norm.running_var = var * (0.5 + torch.rand_like(var))

    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(off_by_half) for norm in norms]
    outputs(network, model, inputs)
    for handle in handles:
        handle.remove()


def outputs(network: Network, model: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """Return every tensor that the forward pass returns."""
    import torch
    from torch.utils._pytree import tree_leaves

    with torch.no_grad():
        result = model(*inputs) if network.forward is None else network.forward(model, *inputs)
    return [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]


def reasons(spec: Any) -> str:
    """Return the operations that left most in place, besides the network's ends."""
    counts: dict[str, int] = {}
    for fixed in spec.fixed:
        if fixed.reason not in ("input", "output", "being one number"):
            counts[fixed.reason] = counts.get(fixed.reason, 0) + fixed.count
    largest = sorted(counts, key=lambda reason: -counts[reason])[:3]
    return "; ".join(f"{counts[reason]} by {reason}" for reason in largest)


def markdown(rows: list[dict[str, str]]) -> str:
    versions = [
        f"{library} {importlib.metadata.version(library)}"
        for library in LIBRARIES
        if importlib.util.find_spec(library) is not None
    ]
    lines = [f"{datetime.date.today()}; {', '.join(versions)}.", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(row[c].replace('|', '/') for c in COLUMNS)} |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
