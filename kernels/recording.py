"""Run a known sequence of launches again, with nothing of Python between them.

The fused paths are straight lines: allocate, launch, allocate, launch. For calls that differ in
addresses only, what they launch with follows from where their inputs and buffers lie. So the
second call of a kind is recorded: which kernels, which parameters, and of every pointer which
input, buffer or result it points into and how far. Later calls take one allocation for all buffers
and one for each result, write the addresses that changed, and launch.

`replay` decides by a key, which must tell calls apart in all but addresses (`paths` makes it).
A call that does anything else than allocate, view and launch cannot be recorded; the recording
notices, and such calls run as written every time.

Example, one input and one buffer::

    def double_twice(x):                        recorded:  kernel k1, pointers (input 0 + 0,
        once = torch.empty_like(x)                         buffers + 0); kernel k2, pointers
        twice = torch.empty_like(x)                        (buffers + 0, result 0 + 0)
        launch(k1, grid, x, once)
        launch(k2, grid, once, twice)
        return (twice,)
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from comet_compile.kernels.packed_launch import (
    PackedLaunch,
    TensorMap,
    UnknownLayoutError,
    address_of,
)

log = logging.getLogger(__name__)

Results = tuple[Tensor | None, ...]

_MAX_KEPT = 1024
_MAX_MAPS = 16
_ALIGNMENT = 256

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


class _Log(TorchDispatchMode):
    """Notes the launches and allocations of one call, and what stands in the way of replaying."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []
        self.allocated: dict[int, Tensor] = {}  # by address; kept, so no address comes twice
        self.obstacle: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATE:
            if out.untyped_storage().nbytes():
                self.allocated[out.untyped_storage().data_ptr()] = out
        elif func not in _VIEW or not _shares_memory(out, args[0]):
            self.obstacle = self.obstacle or f"it calls {func}"
        return out


def _shares_memory(out: Any, base: Tensor) -> bool:
    """Whether a view, or all of a list of views, lies in the memory of `base`."""
    outs = out if isinstance(out, list | tuple) else (out,)
    here = base.untyped_storage().data_ptr()
    return all(one.untyped_storage().data_ptr() == here for one in outs)


class _Active(threading.local):
    """The log that launches of this thread go to."""

    log: _Log | None = None


_active = _Active()


def note_launch(compiled: Any, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
    """Tell the recording in progress, if there is one, of a launch that was made."""
    if _active.log is None:
        return
    # Nothing is loaded in Triton's interpreter, or when kernels are compiled for another device.
    if getattr(compiled, "module", None) is None:
        _active.log.obstacle = "its kernels are not loaded"
    _active.log.launches.append((compiled, grid, args))


@dataclasses.dataclass(frozen=True)
class _Result:
    """How to allocate a result anew."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Recording:
    """The launches of one call; roots are its inputs, then the buffers, then its results."""

    def __init__(self, noted: _Log, inputs: Sequence[Tensor | None], constants: Sequence[Tensor],
                 results: Results) -> None:  # fmt: skip
        if noted.obstacle is not None:
            raise UnknownLayoutError(noted.obstacle)
        self._lock = threading.Lock()
        self._constants = tuple(constants)  # keeps what they point to alive
        self._results = tuple(_describe_result(result, noted) for result in results)
        roots = _Roots(noted, inputs, constants, results)
        self._buffer_bytes, self._num_inputs = roots.buffer_bytes, len(inputs)
        self._device = next(t.device for t in inputs if t is not None)
        num_roots = len(inputs) + 1 + len(results)
        self._bases: list[int | None] = [None] * num_roots
        # of each root: (launch, index of the pointer, offset), and the descriptors
        self._pointers: list[list[tuple[PackedLaunch, int, int]]] = [[] for _ in range(num_roots)]
        self._maps: list[list[_Map]] = [[] for _ in range(num_roots)]
        self._launches = []
        for compiled, grid, args in noted.launches:
            packed = PackedLaunch(compiled, grid, args)
            self._launches.append(packed)
            self._place(packed, args, roots)

    def _place(self, packed: PackedLaunch, args: tuple[Any, ...], roots: _Roots) -> None:
        for place, index in enumerate(packed.pointer_args):
            root, offset = roots.find(address_of(args[index]))
            if root is None:
                packed.addresses[place] = offset
            else:
                self._pointers[root].append((packed, place, offset))
        for place, index in enumerate(packed.map_args):
            root, offset = roots.find(address_of(args[index]))
            if root is None:
                raise UnknownLayoutError("a descriptor of what is no input, buffer or result")
            self._maps[root].append(_Map(packed, place, offset, args[index]))

    def run(self, inputs: Sequence[Tensor | None]) -> Results:
        """Launch everything for these inputs and return new results."""
        device = self._device
        buffers = torch.empty(self._buffer_bytes, dtype=torch.uint8, device=device)
        results = [
            None
            if one is None
            else torch.empty_strided(one.shape, one.strides, dtype=one.dtype, device=one.device)
            for one in self._results
        ]
        roots = (*inputs, buffers, *results)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        # Another thread may be in the middle of the same launches.
        with self._lock:
            for root, tensor in enumerate(roots):
                base = 0 if tensor is None else tensor.data_ptr()
                if base != self._bases[root]:
                    self._move(root, base)
            for packed in self._launches:
                packed.run(stream)
        return tuple(results)

    def _move(self, root: int, base: int) -> None:
        for packed, place, offset in self._pointers[root]:
            packed.addresses[place] = base + offset
        for one in self._maps[root]:
            one.move(base)
        self._bases[root] = base


class _Map:
    """A descriptor of a launch, encoded for the addresses it had lately; the last is in use."""

    def __init__(
        self, packed: PackedLaunch, place: int, offset: int, argument: TensorDescriptor
    ) -> None:
        self._packed, self._place, self._offset = packed, place, offset
        # without its tensor, which would be kept alive
        base = argument.base
        self._argument = TensorDescriptor(
            _Address(base.dtype, base.data_ptr()),
            argument.shape,
            argument.strides,
            argument.block_shape,
            argument.padding,
        )
        self._encoded: collections.OrderedDict[int, TensorMap] = collections.OrderedDict()

    def move(self, base: int) -> None:
        """Take memory that begins `offset` bytes after `base`."""
        address = base + self._offset
        made = self._encoded.get(address)
        if made is None:
            made = self._packed.encode(self._place, self._argument, address)
            self._encoded[address] = made
            if len(self._encoded) > _MAX_MAPS:
                self._encoded.popitem(last=False)
        else:
            self._encoded.move_to_end(address)
        self._packed.set_map(self._place, made)


@dataclasses.dataclass(frozen=True)
class _Address:
    """What a descriptor asks of its base."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        """The address."""
        return self.address


class _Roots:
    """Finds the input, buffer or result that an address of the recorded call lies in."""

    def __init__(
        self,
        noted: _Log,
        inputs: Sequence[Tensor | None],
        constants: Sequence[Tensor],
        results: Results,
    ) -> None:
        self._ranges: list[tuple[int, int, int | None, int]] = []  # begin, end, root, offset
        for root, tensor in enumerate(inputs):
            if tensor is not None and tensor.numel():
                begin = tensor.data_ptr()
                self._ranges.append((begin, begin + _extent(tensor), root, 0))
        result_of: dict[int, int] = {}
        for root, result in enumerate(results, len(inputs) + 1):
            if result is not None and result.numel():
                begin = result.untyped_storage().data_ptr()
                if begin in result_of:
                    raise UnknownLayoutError("two results share memory")
                result_of[begin] = root
        self.buffer_bytes = 0
        for begin, tensor in noted.allocated.items():
            size = tensor.untyped_storage().nbytes()
            if begin in result_of:
                self._ranges.append((begin, begin + size, result_of[begin], 0))
            else:
                self._ranges.append((begin, begin + size, len(inputs), self.buffer_bytes))
                self.buffer_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
        for tensor in constants:
            storage = tensor.untyped_storage()
            begin = storage.data_ptr()
            self._ranges.append((begin, begin + storage.nbytes(), None, begin))

    def find(self, address: int) -> tuple[int | None, int]:
        """Return (root, offset into it), or (None, the address) for what never moves."""
        if address == 0:
            return None, 0
        # of inputs that overlap, the one that begins last: what begins there is meant
        found = [r for r in self._ranges if r[0] <= address < r[1]]
        if found:
            begin, _, root, offset = max(found, key=lambda one: one[0])
            return root, offset + address - begin
        raise UnknownLayoutError("a launch was given memory that is no input, buffer or result")


_recordings: dict[Hashable, Recording | None] = {}
_SEEN_ONCE = object()
_seen: dict[Hashable, object] = {}


def replay(
    key: Hashable,
    inputs: Sequence[Tensor | None],
    call: Callable[[], Results],
    constants: Sequence[Tensor] = (),
) -> Results:
    """Return what `call` returns, from the second repetition on without calling it.

    `key` tells apart calls that differ in more than the addresses of `inputs`; a descriptor over
    two inputs depends on their distance, so `key` has it. Calls with other `constants`, which never
    move, are told apart too. The first call of a key runs as written, the second is recorded as it
    runs.
    """
    if constants:
        # the recording keeps them alive, so their ids are theirs alone
        key = (key, *map(id, constants))
    recording = _recordings.get(key)
    if recording is not None and not _is_watched():
        return recording.run(inputs)
    if key not in _seen:
        _keep(_seen, key, _SEEN_ONCE)
        return call()
    if key in _recordings or _is_watched() or _begin_together(inputs):
        return call()
    noted = _Log()
    _active.log = noted
    try:
        with noted:
            results = call()
    finally:
        _active.log = None
    try:
        _keep(_recordings, key, Recording(noted, inputs, constants, results))
    except UnknownLayoutError as error:
        log.debug("comet: a call of %s launches is not replayed: %s", len(noted.launches), error)
        _keep(_recordings, key, None)
    return results


def _keep(kept: dict[Hashable, Any], key: Hashable, value: Any) -> None:
    if len(kept) >= _MAX_KEPT:
        kept.clear()
    kept[key] = value


def _begin_together(inputs: Sequence[Tensor | None]) -> bool:
    """Whether of a launch's address it could not be told which of two inputs is meant."""
    begins = [t.data_ptr() for t in inputs if t is not None and t.numel()]
    return len(set(begins)) < len(begins)


def _is_watched() -> bool:
    """Whether a profiler asked Triton to be told of launches."""
    hook = knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


def _describe_result(result: Tensor | None, noted: _Log) -> _Result | None:
    if result is None:
        return None
    storage = result.untyped_storage()
    is_whole = storage.nbytes() == _extent(result)
    if result.numel() and (storage.data_ptr() not in noted.allocated or not is_whole):
        raise UnknownLayoutError("a result is not an allocation of the call's own")
    return _Result(tuple(result.shape), result.stride(), result.dtype, result.device)


def _extent(tensor: Tensor) -> int:
    """Return the bytes from a tensor's first element to its last."""
    steps = ((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + sum(steps)) * tensor.element_size() if tensor.numel() else 0
