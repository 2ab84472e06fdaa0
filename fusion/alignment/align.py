"""Align the units of a network with those of a reference, without changing its function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fusion.alignment.agreement import by_activations, by_weights
from fusion.alignment.copies import copied
from fusion.alignment.matching import Matching
from fusion.alignment.permutation import apply_permutation
from fusion.alignment.spec import PermutationSpec
from fusion.alignment.symmetries import on_cpu, permutation_spec, require_eval_mode
from fusion.errors import UserError
from fusion.weights import exact_device

if TYPE_CHECKING:
    import pandas as pd

MAX_SWEEPS = 100  # of one descent; they end by themselves after 5 to 30
By = Literal["weights", "activations"]


@dataclass(frozen=True)
class GroupAlignment:
    """Effect of alignment on one group.

    Attributes:
        group: Name of the group.
        kind: ``units`` or ``blocks``.
        size: Number of units (or blocks).
        moved: Number of them that changed place.
        gain: What the moves of this group added to the
            objective.
    """

    group: str
    kind: str
    size: int
    moved: int
    gain: float


@dataclass(frozen=True, eq=False)
class Alignment:
    """A network in the order of its reference.

    Attributes:
        model: The aligned network, with the same function as the given one.
        permutations: Group name -> permutation, as `apply_permutation` takes them.
        objective_before: Mean cosine of the weights (``by="weights"``), or mean correlation of the
            units (``by="activations"``), with the reference.
        objective_after: The same, aligned; never smaller.
        groups: One row for each group, in the order of the forward pass.
        sweeps: Sweeps of the descent that was kept.
        cycle_consistency: See `cycle_consistency`; None if not requested.
    """

    model: nn.Module
    permutations: Mapping[str, Tensor]
    objective_before: float
    objective_after: float
    groups: tuple[GroupAlignment, ...]
    sweeps: int
    cycle_consistency: float | None = None

    @property
    def changed(self) -> bool:
        """Whether any unit moved."""
        return any(group.moved for group in self.groups)

    def table(self) -> pd.DataFrame:
        """Return the rows of ``groups`` as a table (``alignment.csv``)."""
        import pandas as pd

        columns = list(GroupAlignment.__dataclass_fields__)
        return pd.DataFrame([vars(group) for group in self.groups], columns=columns)


def align(
    model: nn.Module,
    reference: nn.Module,
    *,
    spec: PermutationSpec | None = None,
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    by: By = "weights",
    data: Iterable[Any] | None = None,
    seed: int = 0,
    max_sweeps: int = MAX_SWEEPS,
    device: torch.device | str | None = None,
    cycle: bool = False,
) -> Alignment:
    """Permute the units of ``model`` so that its agreement with ``reference`` is largest.

    Neither network is changed. The result depends on the networks, the data and ``seed`` only. The
    reference itself stays as it is.

    Args:
        model: The network to align, in eval mode, of any floating dtype.
        reference: A network of the same architecture, up to the sizes of its heads.
        spec: The symmetries; found from ``model`` and ``example_input`` if not given.
        example_input: Only needed without ``spec``.
        by: ``weights`` or ``activations``.
        data: For ``activations``: batches of images, or of tuples whose first part is one.
        seed: Order of the groups in the sweeps.
        max_sweeps: Bound on the sweeps of each descent.
        device: Where to compute; the model's own device by default.
        cycle: Whether to measure `cycle_consistency`.

    Raises:
        UserError: architectures that differ, training mode, weights that are not finite, an option
            that is missing or unknown.

    Example::

        >>> import torch
        >>> from fusion.alignment import align, apply_permutation
        >>> from fusion.alignment import permutation_spec, random_permutation
        >>> from fusion.models import CifarResNet
        >>> model = CifarResNet(8).eval()
        >>> spec = permutation_spec(model, torch.zeros(1, 3, 32, 32))
        >>> shuffled = apply_permutation(model, spec, random_permutation(spec))
        >>> aligned = align(shuffled, model, spec=spec)
        >>> torch.equal(aligned.model.conv1.weight, model.conv1.weight)
        True
        >>> round(aligned.objective_after, 6)
        1.0
    """
    _check_options(by, data, max_sweeps)
    _check_values(model, "the model")
    _check_values(reference, "the reference")
    if spec is None:
        if example_input is None:
            raise UserError("align needs either spec or example_input, to find the symmetries")
        _require_same_keys(model, reference)
        spec = permutation_spec(model, example_input)
    _require_one_architecture(model, reference, spec)
    options: dict[str, Any] = {"by": by, "data": data, "seed": seed, "max_sweeps": max_sweeps}
    (matching,) = _matchings([model], reference, spec, **options, device=device)
    return _solved(matching, model, reference, spec, cycle=cycle)


def align_all(
    models: Mapping[str, nn.Module],
    reference: nn.Module,
    *,
    spec: PermutationSpec | None = None,
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    by: By = "weights",
    data: Iterable[Any] | None = None,
    seed: int = 0,
    max_sweeps: int = MAX_SWEEPS,
    device: torch.device | str | None = None,
    cycle: bool = False,
) -> dict[str, Alignment]:
    """Align each of ``models`` to ``reference``; the options are those of `align`.

    ``data`` is read once, and each network sees it once, the reference as well; ``activations``
    therefore take copies of all networks at a time, by default on the first model's device. A
    model that is ``reference`` itself is neither run again nor moved.

    Raises:
        UserError: as in `align`, with the name of the model in front of the message.

    Example::

        >>> import torch
        >>> from fusion.alignment import align_all, apply_permutation
        >>> from fusion.alignment import permutation_spec, random_permutation
        >>> from fusion.models import CifarResNet
        >>> model = CifarResNet(8).eval()
        >>> spec = permutation_spec(model, torch.zeros(1, 3, 32, 32))
        >>> shuffled = apply_permutation(model, spec, random_permutation(spec))
        >>> found = align_all({"same": model, "shuffled": shuffled}, model, spec=spec)
        >>> {name: alignment.changed for name, alignment in found.items()}
        {'same': False, 'shuffled': True}
    """
    _check_options(by, data, max_sweeps)
    if spec is None:
        if example_input is None:
            raise UserError("align needs either spec or example_input, to find the symmetries")
        spec = permutation_spec(reference, example_input)
    _check_values(reference, "the reference")
    for name, model in models.items():
        try:
            _check_values(model, "the model")
            _require_one_architecture(model, reference, spec)
        except UserError as error:
            raise UserError(f"'{name}': {error}") from error
    options: dict[str, Any] = {"by": by, "seed": seed, "max_sweeps": max_sweeps, "device": device}
    # All at once for activations; weights are scaled and copied one model at a time.
    pairs = list(models.items())
    parts = [[pair] for pair in pairs] if by == "weights" else [pairs] if pairs else []
    found = {}
    for part in parts:
        networks = [model for _, model in part]
        matchings = _matchings(networks, reference, spec, **options, data=data)
        for (name, model), matching in zip(part, matchings, strict=True):
            found[name] = _solved(matching, model, reference, spec, cycle=cycle)
    return found


def cycle_consistency(
    model: nn.Module,
    reference: nn.Module,
    *,
    spec: PermutationSpec,
    by: By = "weights",
    data: Iterable[Any] | None = None,
    seed: int = 0,
    max_sweeps: int = MAX_SWEEPS,
    device: torch.device | str | None = None,
) -> float:
    """Return the mean squared difference between a model and its image under both alignments.

    Both directions are matched by the same comparison: each network sees ``data`` once. The options
    are those of `align`, which returns this value in addition to the alignment with ``cycle=True``.

    Returns:
        Mean squared difference between the model's parameters and the same after both
        permutations. 0: the two alignments undo each other.

    Example::

        >>> import torch
        >>> from fusion.alignment import apply_permutation, cycle_consistency
        >>> from fusion.alignment import permutation_spec, random_permutation
        >>> from fusion.models import CifarResNet
        >>> model = CifarResNet(8).eval()
        >>> spec = permutation_spec(model, torch.zeros(1, 3, 32, 32))
        >>> shuffled = apply_permutation(model, spec, random_permutation(spec))
        >>> cycle_consistency(shuffled, model, spec=spec)
        0.0
    """
    found = align(
        model, reference, spec=spec, by=by, data=data, seed=seed, max_sweeps=max_sweeps,
        device=device, cycle=True,
    ).cycle_consistency  # fmt: skip
    assert found is not None
    return found


def _check_options(by: str, data: Iterable[Any] | None, max_sweeps: int) -> None:
    if by not in ("weights", "activations"):
        raise UserError(f"by must be 'weights' or 'activations', got '{by}'")
    if max_sweeps < 1:
        raise UserError(f"max_sweeps must be at least 1, got {max_sweeps}")
    if by == "activations" and data is None:
        raise UserError("by='activations' needs data: pass batches of images, as a loader yields")


def _check_values(network: nn.Module, which: str) -> None:
    require_eval_mode(network, which)
    _require_finite(network, which)


def _matchings(
    models: Sequence[nn.Module],
    reference: nn.Module,
    spec: PermutationSpec,
    *,
    by: By,
    data: Iterable[Any] | None,
    seed: int,
    max_sweeps: int,
    device: torch.device | str | None,
) -> list[Matching]:
    """Return the alignment problem of each model; all share the symmetries."""
    own = next(models[0].parameters(), torch.empty(0)).device
    where = exact_device(device if device is not None else own)
    options: dict[str, Any] = {"seed": seed, "max_sweeps": max_sweeps, "device": where}
    if by == "weights":
        return [by_weights(spec, model, reference, **options) for model in models]
    assert data is not None
    anchor = copied(reference)
    copies = [anchor if model is reference else copied(model) for model in models]
    return by_activations(spec, copies, anchor, data, **options)


def _solved(
    matching: Matching,
    model: nn.Module,
    reference: nn.Module,
    spec: PermutationSpec,
    *,
    cycle: bool,
) -> Alignment:
    itself = model is reference
    with on_cpu():  # permutations live there, whatever the default device
        found, before = matching.stay() if itself else matching.solve()
        back = matching.reversed().solve()[0] if cycle and not itself else None
        rows = []
        for group in spec.groups:
            p = found.permutations[group.name]
            moved = int((p != torch.arange(group.size)).sum())
            kind = "blocks" if group.members else "units"
            gain = found.gains[group.name]
            rows.append(GroupAlignment(group.name, kind, group.size, moved, gain))
    aligned = apply_permutation(model, spec, found.permutations)
    change = 0.0 if cycle else None
    if back is not None:
        change = _mean_square(model, apply_permutation(aligned, spec, back.permutations))
    return Alignment(
        model=aligned,
        permutations=found.permutations,
        objective_before=before,
        objective_after=found.objective,
        groups=tuple(rows),
        sweeps=found.sweeps,
        cycle_consistency=change,
    )


def _mean_square(model: nn.Module, other: nn.Module) -> float:
    """Return the mean squared difference of the parameters of two networks."""
    pairs = [
        tuple(p.detach().to(exact_device(p.device)).double() for p in pair)
        for pair in zip(model.parameters(), other.parameters(), strict=True)
    ]
    squares = sum(float((a - b).square().sum()) for a, b in pairs)
    return squares / max(sum(a.numel() for a, _ in pairs), 1)


def _require_finite(network: nn.Module, which: str) -> None:
    for name, tensor in network.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue  # a module's extra state
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(
                f"{which} has weights that are not finite in '{name}'; "
                f"alignment compares weights, so give a network that trained without overflow"
            )


def _require_same_keys(model: nn.Module, reference: nn.Module) -> None:
    ours, theirs = model.state_dict().keys(), reference.state_dict().keys()
    if ours != theirs:
        lone = sorted(ours ^ theirs)[0]
        owner = "model" if lone in ours else "reference"
        raise UserError(
            f"the model ({type(model).__name__}) and the reference ({type(reference).__name__}) "
            f"differ in architecture: only the {owner} has '{lone}'; align networks of one kind"
        )


def _require_one_architecture(
    model: nn.Module, reference: nn.Module, spec: PermutationSpec
) -> None:
    """Check that both networks have the tensors of ``spec``, of one length along its axes."""
    _require_same_keys(model, reference)
    ours, theirs = model.state_dict(), reference.state_dict()
    for key, parts in spec.by_tensor.items():
        if key not in ours:
            raise UserError(
                f"the spec names the tensor '{key}', which {type(model).__name__} does not have; "
                f"it belongs to another architecture"
            )
        # A tensor that is read in another shape must be as long as it was along all axes.
        whole = any(entry.view is not None for _, entry in parts)
        axes = range(len(spec.shapes[key])) if whole else {entry.axis for _, entry in parts}
        for axis in sorted(axes):
            lengths = [tensor.shape[axis : axis + 1] for tensor in (ours[key], theirs[key])]
            if lengths[0] != lengths[1] or tuple(lengths[0]) != spec.shapes[key][axis : axis + 1]:
                raise UserError(
                    f"'{key}' is {tuple(ours[key].shape)} in the model, "
                    f"{tuple(theirs[key].shape)} in the reference and {spec.shapes[key]} in the "
                    f"spec; along axis {axis}, whose units are matched, they must agree"
                )
