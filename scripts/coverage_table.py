"""How many of the parameters of convolutional networks lie on a permutable axis, by family.

    python scripts/coverage_table.py [--families timm,video] [--only NAME] [--output coverage]

For one or more small members of each family: the symmetries that `permutation_spec` finds, the
relative change of the output under a random permutation (float64, a batch of two, every norm and
bias randomised), and whether a planted permuted copy comes back bit for bit. Every network runs in
a process of its own with a time limit, so that memory stays bounded. Rows that already stand in
the CSV file are not measured again: delete them (or the file) to do so. `timm` and
`segmentation_models_pytorch` are needed by the families that take networks from them only.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from coverage_networks import FAMILIES, Network

TIME_LIMIT = 300  # seconds for one network, imports included
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
    parser.add_argument("--measure", nargs=2, metavar=("FAMILY", "NETWORK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        family, name = arguments.measure
        print(json.dumps(measure(family, FAMILIES[family][name])))
        return
    chosen = arguments.families.split(",")
    unknown = sorted(set(chosen) - set(FAMILIES))
    if unknown:
        parser.error(f"no family '{unknown[0]}'; there are {', '.join(FAMILIES)}")
    rows = survey(chosen, arguments.only, arguments.output.with_suffix(".csv"), arguments.limit)
    table = markdown(rows)
    arguments.output.with_suffix(".md").write_text(table)
    print(table)


def survey(chosen: list[str], only: str | None, path: Path, limit: int) -> list[dict[str, str]]:
    """Measure what is not in the CSV file yet, and return all rows of the families chosen."""
    rows = read(path)
    for family in chosen:
        for name in FAMILIES[family]:
            key = (family, name)
            if key in rows or (only is not None and not name.startswith(only)):
                continue
            rows[key] = in_child(family, name, limit)
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


def in_child(family: str, name: str, limit: int) -> dict[str, str]:
    command = [sys.executable, __file__, "--measure", family, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        found: dict[str, Any] = {"remark": f"stopped after {limit} s"}
    else:
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            found = {"remark": f"failed: {last}"}
        else:
            found = json.loads(done.stdout.splitlines()[-1])
    row = {"family": family, "network": name, **found}
    return {column: str(row.get(column, "")) for column in COLUMNS}


# -- one network, in the child ---------------------------------------------------------------------


def measure(family: str, network: Network) -> dict[str, Any]:
    """Return the columns of one network."""
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
        return {"remark": f"the family {family} needs {error.name}: pip install {error.name}"}
    parameters = sum(p.numel() for p in wide.parameters())
    row: dict[str, Any] = {"parameters (M)": round(parameters / 1e6, 2)}
    torch.manual_seed(1)
    inputs = tuple(torch.randn(2, *shape, dtype=torch.float64) for shape in network.shapes)
    calibrate(wide, network, inputs)
    options = {} if network.forward is None else {"forward": network.forward}
    start = time.perf_counter()
    try:
        spec = permutation_spec(wide, tuple(x[:1] for x in inputs), **options)
    except UserError as error:
        seconds = round(time.perf_counter() - start, 2)
        return {**row, "coverage": 0, "spec (s)": seconds, "remark": f"not traceable: {error}"}
    row["spec (s)"] = round(time.perf_counter() - start, 2)
    row["groups"] = len(spec.groups)
    row["units"] = sum(group.size for group in spec.groups)
    row["coverage"] = round(spec.coverage, 5)
    row["remark"] = reasons(spec)

    planted = random_permutation(spec, 1)
    expected = outputs(network, wide, inputs)
    got = outputs(network, apply_permutation(wide, spec, planted), inputs)
    error = max(
        float((a - b).norm() / a.norm().clamp(min=1e-300))
        for a, b in zip(expected, got, strict=True)
    )
    row["output error"] = f"{error:.1e}"
    del expected, got
    reference = wide.to(torch.float32)
    other = apply_permutation(reference, spec, planted)
    start = time.perf_counter()
    found = align(other, reference, spec=spec).model
    row["align (s)"] = round(time.perf_counter() - start, 2)
    pairs = zip(reference.state_dict().values(), found.state_dict().values(), strict=True)
    row["recovered"] = "yes" if all(torch.equal(a, b) for a, b in pairs) else "no"
    return row


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
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(row[c].replace('|', '/') for c in COLUMNS)} |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
