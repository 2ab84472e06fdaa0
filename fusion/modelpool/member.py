"""Members of a pool: descriptions of networks, which are built on request."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fusion.data import Preprocessing, preprocessing_of
from fusion.errors import UserError
from fusion.labels import LabelSpace
from fusion.modelpool.bare import without_pretrained_weights
from fusion.modelpool.fingerprint import canonical_text, digest_tensors
from fusion.modelpool.soundness import deep_copy, require_sound, unwrapped
from fusion.models.layers import without_values
from fusion.target import build, is_target, locate, refusal
from fusion.weights import ModuleSource, TensorSource, tensors_of

# Functions that fill a tensor with random numbers. Those of torch.nn.init that are not here call
# one of the tensor's own methods.
_RANDOM = (
    nn.init.uniform_,
    nn.init.normal_,
    nn.init.trunc_normal_,
    nn.init.kaiming_uniform_,
    nn.init.kaiming_normal_,
    Tensor.uniform_,
    Tensor.normal_,
)

Architecture = nn.Module | Mapping[str, Any] | Callable[[], nn.Module]


class Member(ABC):
    """One network of a pool: an immutable description, independent of any pool.

    Every method receives the `Entry` of the member in a pool; ``None`` where it is used alone.

    Attributes:
        init_from: name of the member of the same pool that this one starts from, if any.
        architecture_spec: the mapping with ``_target_`` that builds the bare architecture, where
            there is one; it is copied to the metadata of networks merged from this member.
        source: the file, or the path on the hub, that the weights are read from, if any.
    """

    init_from: str | None = None
    source: str | None = None
    architecture_spec: Mapping[str, Any] | None = None

    @abstractmethod
    def build(self, entry: Entry | None = None) -> nn.Module:
        """Return the network with its weights, a new object at every call."""

    @abstractmethod
    def architecture(self) -> nn.Module:
        """Return the network's structure on the meta device, without weights."""

    def architecture_key(self) -> str | None:
        """Return a text that only members of an equal :meth:`architecture` have, if there is one.

        The mapping that builds the architecture, where nothing else decides it.
        """
        return None

    def labels(self, entry: Entry | None = None) -> LabelSpace | None:
        """Return the classes of the outputs, if the member itself states them."""
        del entry
        return None

    def stored(self, entry: Entry | None = None) -> TensorSource | None:
        """Return the weights where they can be read without building the network, else None."""
        del entry
        return None

    def unfilled(self, entry: Entry | None = None) -> nn.Module | None:
        """Return the network without the values that :meth:`stored` has; a new object.

        They take no memory: they are on the meta device, or were never written to. ``None`` where
        the member has no such network.
        """
        del entry
        return None

    def tensors(self, entry: Entry | None = None) -> TensorSource:
        """Return the weights, tensor by tensor, building the network only where that is needed."""
        return self.stored(entry) or ModuleSource(self.build(entry))

    def fingerprint(self, entry: Entry | None = None) -> str:
        """Return a hash of everything that determines the weights."""
        return digest_tensors(dict(self.tensors(entry)))

    def train(self, entry: Entry, *, wait: bool = True) -> bool:
        """Train the network if that remains to be done; return whether its weights are there.

        Args:
            entry: the member in a pool.
            wait: wait for another process that trains it; else return ``False`` then.
        """
        del entry, wait
        return True

    def check(self, entry: Entry) -> list[str]:
        """Return what is wrong with this member alone, one sentence each, before any work."""
        del entry
        return []


@dataclass(frozen=True, eq=False)
class Entry:
    """A member under a name in a pool.

    Attributes:
        name: the name.
        member: the member.
        parent: the entry of the member that this one starts from.
        head: modules or tensors that the pool's user named as the head; ``None`` to find it from
            the network's graph.
        known: the classes that the pool's user gave for it.
    """

    name: str
    member: Member
    parent: Entry | None = None
    head: tuple[str, ...] | None = None
    known: LabelSpace | None = None

    def build(self) -> nn.Module:
        """Return the network with its weights, a new object at every call."""
        return self.member.build(self)

    def architecture(self) -> nn.Module:
        """Return the network's structure on the meta device, without weights."""
        return self.member.architecture()

    def labels(self) -> LabelSpace | None:
        """Return the classes of the outputs, as given or as stated by the member."""
        return self.known or self.member.labels(self)

    def stored(self) -> TensorSource | None:
        """Return the weights where they can be read without building the network, else None."""
        return self.member.stored(self)

    def unfilled(self) -> nn.Module | None:
        """Return the network without the values that :meth:`stored` has, if there is one."""
        return self.member.unfilled(self)

    def tensors(self) -> TensorSource:
        """Return the weights, tensor by tensor, building the network only where that is needed."""
        return self.member.tensors(self)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that determines the weights, as of the first access."""
        return self.member.fingerprint(self)

    @cached_property
    def preprocessing(self) -> Preprocessing | None:
        """Preprocessing that the weights expect, where torchvision or timm publish it.

        Weights are the member's own, or those that it starts from.
        """
        spec = self.member.architecture_spec
        found = None if spec is None else preprocessing_of(spec)
        if found is None and self.parent is not None:
            return self.parent.preprocessing
        return found

    @cached_property
    def architecture_key(self) -> str:
        """A text that only members of an equal architecture have: a mapping, or the name."""
        return self.member.architecture_key() or self.name

    def train(self, *, wait: bool = True) -> bool:
        """Train the network, and those it starts from, if that remains to be done.

        Args:
            wait: wait for other processes that train them; else return ``False`` then.

        Returns:
            whether the weights are there.
        """
        if self.parent is not None and not self.parent.train(wait=wait):
            return False
        return self.member.train(self, wait=wait)

    def check(self) -> list[str]:
        """Return what is wrong with this member alone, one sentence each, before any work."""
        return self.member.check(self)


class ModuleMember(Member):
    """A member given as a module. The pool returns copies of it."""

    def __init__(self, module: nn.Module, name: str = "model") -> None:
        self._module = unwrapped(module)
        self._name = name
        require_sound(name, self._module)

    def build(self, entry: Entry | None = None) -> nn.Module:
        """Return a deep copy, so that no algorithm can change the user's module."""
        del entry
        return deep_copy(self._name, self._module)

    def architecture(self) -> nn.Module:
        """Return a copy on the meta device; the weights themselves are never copied."""
        return deep_copy(self._name, self._module, values=False)

    def stored(self, entry: Entry | None = None) -> TensorSource:
        """Return the module's own tensors."""
        del entry
        return ModuleSource(self._module)


class FactoryMember(Member):
    """A network built by a ``_target_`` mapping or a zero-argument callable."""

    def __init__(self, factory: Mapping[str, Any] | Callable[[], nn.Module]) -> None:
        self._factory = factory
        if isinstance(factory, Mapping):
            self.architecture_spec = factory

    def build(self, entry: Entry | None = None) -> nn.Module:
        """Build the network; the result of a callable is copied, since it may keep a reference."""
        del entry
        made = build_architecture(self._factory)
        return made if isinstance(self._factory, Mapping) else copy.deepcopy(made)

    def architecture(self) -> nn.Module:
        """Make the network on the meta device."""
        return on_meta(self._factory)

    def architecture_key(self) -> str | None:
        """Return the mapping as text."""
        spec = self.architecture_spec
        return None if spec is None else canonical_text(spec)


def as_member(name: str, value: object) -> Member:
    """Convert a user's entry of ``models`` under ``name`` to a member.

    Raises:
        UserError: it is none of the kinds that a pool takes.
    """
    if isinstance(value, Member):
        return value
    if isinstance(value, nn.Module):
        return ModuleMember(value, name)
    if isinstance(value, Mapping):
        if not is_target(value):
            raise UserError(
                f"model '{name}': the mapping has no '_target_' (it has "
                f"{', '.join(map(repr, value)) or 'nothing'}); name the class or function to call"
            )
        target = locate(str(value["_target_"]))
        if isinstance(target, type) and issubclass(target, Member):
            member: Member = build({**value, "_recursive_": value.get("_recursive_", False)})
            return member
        return FactoryMember(value)
    if callable(value):
        return FactoryMember(value)
    raise UserError(
        f"model '{name}' is a {type(value).__name__}; a pool takes a torch.nn.Module, a mapping "
        f"with _target_, a zero-argument callable, a Checkpoint or a TrainedModel"
    )


def build_architecture(architecture: Architecture) -> nn.Module:
    """Make a network from a module (copied), a ``_target_`` mapping or a callable.

    Raises:
        UserError: the result is not a ``torch.nn.Module``.
    """
    if isinstance(architecture, nn.Module):
        return copy.deepcopy(architecture)
    made = build(architecture) if isinstance(architecture, Mapping) else architecture()
    if not isinstance(made, nn.Module):
        what = architecture["_target_"] if isinstance(architecture, Mapping) else architecture
        raise UserError(f"{what} returned a {type(made).__name__}; expected a torch.nn.Module")
    return made


def build_unfilled(architecture: Architecture) -> nn.Module:
    """Build a network to be filled with weights; its initial weights take no memory.

    Tensors outside of the state dict, such as a table of constants, have their values.
    """
    if isinstance(architecture, nn.Module):
        return without_values(architecture, tensors_of(architecture))
    with WithoutRandomValues():
        return build_architecture(architecture)


def on_meta(architecture: Architecture) -> nn.Module:
    """Make a network's structure on the meta device, where tensors have shapes but no values."""
    if isinstance(architecture, nn.Module):
        return without_values(architecture)
    if isinstance(architecture, Mapping):
        architecture = without_pretrained_weights(architecture)
    try:
        with torch.device("meta"), WithoutRandomValues():
            made = build_architecture(architecture)
    except (NotImplementedError, RuntimeError):
        # Some constructors compute on their fresh weights, which the meta device cannot do.
        made = _made_for_real(architecture)
    bare = all(tensor.is_meta for tensor in (*made.parameters(), *made.buffers()))
    return made if bare else without_values(made)


def _made_for_real(architecture: Architecture) -> nn.Module:
    try:
        return build_architecture(architecture)
    except RuntimeError as error:
        if not isinstance(architecture, Mapping):
            raise
        options = {name: value for name, value in architecture.items() if not name.startswith("_")}
        raise refusal(architecture["_target_"], options, error) from error


class WithoutRandomValues(TorchFunctionMode):
    """Leave out the random initialisation of parameters, and of all tensors on the meta device.

    Parameters that a state dict is about to fill need none. On the meta device torch takes a detour
    for it that imports its compiler: two seconds, and a hundred megabytes.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta or isinstance(tensor, nn.Parameter):
                return tensor
        return func(*args, **kwargs)
