"""Forward passes over several batches, synchronised at chosen modules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from fusion.training.channel_statistics import Enough, look


class Lockstep:
    """Runs a network over all batches together, from stop to stop.

    A forward pass is ordinary Python, which cannot be suspended and resumed. Therefore each batch
    runs in a separate thread, and only one thread runs at any time, in the order of the batches, so
    that results do not depend on the scheduler. Between two stops the network may be changed. The
    activations that each batch needs to continue are kept in memory meanwhile.

    Args:
        model: the network, without gradients.
        batches: of images, on the device of the network.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Tensor]) -> None:
        self._passes = [_Pass(model, pictures) for pictures in batches]
        self._running: _Pass | None = None

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *error: object) -> None:
        for one in self._passes:
            one.end()

    def advance(self) -> None:
        """Run every batch to its next stop, or to the end."""
        for one in self._passes:
            self._running = one
            one.advance()

    def stop(self) -> None:
        """Halt the running pass until the next `advance`; called by its hooks."""
        assert self._running is not None
        self._running.halt()


class _Pass:
    """The forward pass of one batch, in a thread."""

    def __init__(self, model: nn.Module, pictures: Tensor) -> None:
        self._go = threading.Semaphore(0)
        self._halted = threading.Semaphore(0)
        self._error: BaseException | None = None
        self._over = False
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, args=(model, pictures), daemon=True)
        # These are of the thread that asks, and would not hold in another.
        self._default_device = torch.get_default_device()

    def advance(self) -> None:
        if self._over:
            return
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        self._halted.acquire()
        if self._error is not None:
            raise self._error

    def halt(self) -> None:
        self._halted.release()
        self._go.acquire()
        if self._abandoned:
            raise Enough

    def end(self) -> None:
        """Abort the pass at its present stop."""
        self._abandoned = True
        self._go.release()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self, model: nn.Module, pictures: Tensor) -> None:
        self._go.acquire()
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(self._default_device)
                if pictures.device.type == "cuda":
                    stack.enter_context(torch.cuda.device(pictures.device))
                look(model, pictures)
        except Enough:
            pass
        except BaseException as error:  # noqa: BLE001  # raised again by `advance`
            self._error = error
        finally:
            self._over = True
            self._halted.release()


class HeldBytes(TorchFunctionMode):
    """Counts, while it is active, the bytes of all tensors that were computed and still live.

    Args:
        given: existing tensors, which are counted as well.
    """

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self._sizes: MutableMapping[torch.UntypedStorage, int] = WeakIdKeyDictionary()
        self._add(given)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # whatever the function returns
        """Run the function, and note what it returns."""
        result = func(*args, **(kwargs or {}))
        self._add(tree_leaves(result))
        return result

    def now(self) -> int:
        """Return the bytes at this moment."""
        return sum(self._sizes.values())

    def _add(self, values: Iterable[object]) -> None:
        for value in values:
            if isinstance(value, Tensor) and value.layout == torch.strided:
                storage = value.untyped_storage()
                self._sizes[storage] = storage.nbytes()
