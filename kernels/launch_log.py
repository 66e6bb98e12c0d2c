"""What a call does while it is recorded: its launches, and which memory each of them uses.

Every allocation of the call is a buffer, numbered in order. The log keeps none of them alive, so a
recorded call takes no more memory than any other; an address means the buffer that lies there when
the launch is made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from comet_compile.kernels.packed_launch import PackedLaunch, UnknownLayoutError, address_of

_aten = torch.ops.aten
_ALLOCATE = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
# Some of them copy where they must; an op sees these undecomposed, and their result tells.
_VIEW = {
    _aten.alias.default,
    _aten.as_strided.default,
    _aten.contiguous.default,
    _aten.detach.default,
    _aten.expand.default,
    _aten.permute.default,
    _aten.reshape.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.t.default,
    _aten.to.dtype,
    _aten.transpose.int,
    _aten.unsqueeze.default,
    _aten.view.default,
    _aten.view.dtype,
    _aten._reshape_alias.default,
    _aten._unsafe_view.default,
}


class Memory(NamedTuple):
    """A place in an "input" or a "buffer", by number; or an address that never moves ("fixed")."""

    kind: str
    number: int
    offset: int


@dataclasses.dataclass
class LoggedLaunch:
    """A launch ready to go again, and where its pointers and descriptors begin."""

    packed: PackedLaunch
    pointers: list[Memory]
    maps: list[tuple[Memory, TensorDescriptor]]
    released: list[int] = dataclasses.field(default_factory=list)
    """Inputs whose memory is given back when it has been made."""


class LaunchLog(TorchDispatchMode):
    """Notes the launches and allocations of one call, and what stands in the way of replaying."""

    def __init__(
        self, inputs: Sequence[Tensor | None] = (), constants: Iterable[Tensor] = ()
    ) -> None:
        super().__init__()
        self.launches: list[LoggedLaunch] = []
        self.buffer_bytes: list[int] = []
        self.obstacle: str | None = None
        self._buffers: dict[int, tuple[int, int]] = {}  # begin -> end, index; also freed ones
        # begin, end, what lies there
        self._others = [
            (tensor.data_ptr(), tensor.data_ptr() + extent(tensor), Memory("input", index, 0))
            for index, tensor in enumerate(inputs)
            if tensor is not None and tensor.numel()
        ]
        for tensor in constants:
            begin = tensor.untyped_storage().data_ptr()
            end = begin + tensor.untyped_storage().nbytes()
            self._others.append((begin, end, Memory("fixed", 0, begin)))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATE:
            self._note_buffer(out.untyped_storage())
        elif func not in _VIEW or not _shares_memory(out, args[0]):
            self.obstacle = self.obstacle or f"it calls {func}"
        return out

    def note_launch(self, compiled: Any, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """Take a launch that was made into the log."""
        # Nothing is loaded in Triton's interpreter, or when kernels are compiled for another device
        if getattr(compiled, "module", None) is None:
            self.obstacle = "its kernels are not loaded"
        if self.obstacle is not None:
            return
        try:
            packed = PackedLaunch(compiled, grid, args)
            pointers = [self._find(address_of(args[index])) for index in packed.pointer_args]
            maps = [(self._find(address_of(args[i])), args[i]) for i in packed.map_args]
        except UnknownLayoutError as error:
            self.obstacle = str(error)
            return
        if any(memory.kind == "fixed" for memory, _ in maps):
            self.obstacle = "a descriptor of what is no input, buffer or result"
            return
        without_tensors = [(memory, _without_tensor(argument)) for memory, argument in maps]
        self.launches.append(LoggedLaunch(packed, pointers, without_tensors))

    def note_release(self, tensor: Tensor) -> None:
        """Note that an input's memory is given back here."""
        begin = tensor.data_ptr()
        found = [m for at, _, m in self._others if at == begin and m.kind == "input"]
        if len(found) != 1 or not self.launches:
            self.obstacle = self.obstacle or "it releases what is no input, or before any launch"
            return
        self.launches[-1].released.append(found[0].number)
        # buffers to come may lie there
        self._others = [one for one in self._others if one[2] != found[0]]

    def buffer_of(self, tensor: Tensor) -> int | None:
        """Return the buffer that `tensor`, which is alive, is in all its extent."""
        storage = tensor.untyped_storage()
        _, index = self._buffers.get(storage.data_ptr(), (0, None))
        return index if storage.nbytes() == extent(tensor) else None

    def _note_buffer(self, storage: torch.UntypedStorage) -> None:
        begin, size = storage.data_ptr(), storage.nbytes()
        if size == 0:
            return
        # what lay here before has been freed
        gone = [at for at, (end, _) in self._buffers.items() if at < begin + size and begin < end]
        for at in gone:
            del self._buffers[at]
        self._buffers[begin] = begin + size, len(self.buffer_bytes)
        self.buffer_bytes.append(size)

    def _find(self, address: int) -> Memory:
        if address == 0:
            return Memory("fixed", 0, 0)
        found = [(begin, memory) for begin, end, memory in self._others if begin <= address < end]
        found += [
            (begin, Memory("buffer", index, 0))
            for begin, (end, index) in self._buffers.items()
            if begin <= address < end
        ]
        if not found:
            raise UnknownLayoutError("a launch was given memory that is no input, buffer or result")
        # of inputs that overlap, the one that begins last: what begins there is meant
        begin, memory = max(found, key=lambda one: one[0])
        return memory._replace(offset=memory.offset + address - begin)


def extent(tensor: Tensor) -> int:
    """Return the bytes from a tensor's first element to its last."""
    steps = ((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + sum(steps)) * tensor.element_size() if tensor.numel() else 0


def _shares_memory(out: Any, base: Tensor) -> bool:
    """Whether a view, or all of a list of views, lies in the memory of `base`."""
    outs = out if isinstance(out, list | tuple) else (out,)
    here = base.untyped_storage().data_ptr()
    return all(one.untyped_storage().data_ptr() == here for one in outs)


@dataclasses.dataclass(frozen=True)
class _Address:
    """What a descriptor asks of its base."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        """The address."""
        return self.address


def _without_tensor(argument: TensorDescriptor) -> TensorDescriptor:
    base = argument.base
    return TensorDescriptor(
        _Address(base.dtype, base.data_ptr()),
        argument.shape,
        argument.strides,
        argument.block_shape,
        argument.padding,
    )


class _Active(threading.local):
    """The log that launches of this thread go to."""

    log: LaunchLog | None = None


_active = _Active()


@contextlib.contextmanager
def logging_to(log: LaunchLog) -> Iterator[None]:
    """Have this thread's launches and allocations noted in `log`."""
    _active.log = log
    try:
        with log:
            yield
    finally:
        _active.log = None


def note_launch(compiled: Any, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
    """Tell the recording in progress, if there is one, of a launch that was made."""
    if _active.log is not None:
        _active.log.note_launch(compiled, grid, args)


def release(tensor: Tensor) -> None:
    """Give the memory of an input of the call back, which no one may read from here on.

    The tensor keeps its shape, with a storage of no bytes.
    """
    if _active.log is not None:
        _active.log.note_release(tensor)
    tensor.untyped_storage().resize_(0)
