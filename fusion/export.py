"""Write one task of a merged network as a plain network: a state dict or ONNX."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fusion.alignment.example import example_input_for
from fusion.errors import UserError, suggestion
from fusion.files import atomic_path
from fusion.modelpool import Checkpoint
from fusion.modelpool.network_file import save_network
from fusion.models import MultiTaskNetwork, find_head

log = logging.getLogger(__name__)

FORMATS = (".safetensors", ".pt", ".pth", ".onnx")


def export(
    path: str | Path,
    to: str | Path,
    *,
    task: str | None = None,
    shape: Sequence[int] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a network that this package saved for use without this package.

    Args:
        path: the file, with one head or several.
        to: the file to write: ``.safetensors`` or ``.pt`` (a state dict of the original class,
            which ``load_state_dict`` takes) or ``.onnx`` (extra: onnx).
        task: the task of the exported head; optional if there is only one.
        shape: of one image, (C, H, W), for ONNX; by default the first common size that fits.
        overwrite: whether ``to`` may be replaced.

    Returns:
        the path of the written file.

    Raises:
        UserError: the file cannot be read, has no such task, or ``to`` has another ending or exists
            already.
    """
    to = Path(to)
    if to.suffix not in FORMATS:
        raise UserError(
            f"to={to}: there is no such format{suggestion(to.suffix, FORMATS)} (there are "
            f"{', '.join(FORMATS)})"
        )
    if to.exists() and not overwrite:
        raise UserError(f"to={to}: the file is there already; choose another name")
    checkpoint = Checkpoint(path)
    model = checkpoint.build().eval()
    labels = checkpoint.labels()
    if isinstance(model, MultiTaskNetwork):
        if task is None and len(model.tasks) > 1:
            raise UserError(
                f"'{path}' has a head for each of {', '.join(model.tasks)}; say which: task=NAME"
            )
        task = task or model.tasks[0]
        labels, model = model.labels.get(task), model.for_task(task)
    elif task is not None:
        raise UserError(f"'{path}' has one head and no tasks; leave task={task} out")
    if to.suffix == ".onnx":
        _to_onnx(model, to, shape)
    elif to.suffix == ".safetensors":
        head = find_head(model).tensors
        spec = checkpoint.architecture_spec
        save_network(to, model, architecture=spec, head=head, labels=labels)
    else:
        with atomic_path(to) as temporary:
            torch.save(model.state_dict(), temporary)
    log.info("Wrote %s", to)
    return to


def _to_onnx(model: nn.Module, to: Path, shape: Sequence[int] | None) -> None:
    try:
        import onnx  # noqa: F401 - what torch.onnx needs
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"to={to}: ONNX needs further packages: pip install 'fusion-cnn[onnx]'"
        ) from error
    example: Tensor = example_input_for(model, shape)
    batch = torch.export.Dim("batch")
    # Two images: a batch of one would be taken for a constant.
    images = example.expand(2, *example.shape[1:]).contiguous()
    with atomic_path(to) as temporary:
        torch.onnx.export(
            model,
            (images,),
            str(temporary),
            input_names=["images"],
            output_names=["scores"],
            dynamic_shapes=({0: batch},),
            external_data=False,
            verbose=False,
        )
