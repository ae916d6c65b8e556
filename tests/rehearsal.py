"""A simulated device: everything is computed on the CPU, and placed as on CUDA or on Apple's GPU.

All tensors are ordinary CPU tensors; a mark on a tensor's storage says that it is on the device. One mode makes
`.device`, `.to` and factories with `device=` tell of and obey the mark, another sees every ATen kernel, hands marks on
to results, and raises what a device raises where marks are mixed: 0-dimensional CPU tensors may be mixed in, CPU
indices may index device tensors, copies may cross. Allocations beyond the device's memory raise torch.OutOfMemoryError.
Pinned memory is counted as torch's allocator holds it. Copies from and to it that nobody waited for are under way
until something waits: whoever reads or writes what they have yet to write or read is told.
What it cannot show: speed, kernels that do not take a type, workspaces of libraries, races on the device.
"""

import math
import types
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CPU = torch.device("cpu")
MARK, PINNED = "_rehearsed", "_pinned"


class Device:
    """What the simulated device holds, and what has happened on it.

    Attributes:
        device: that tensors seem to be on.
        size, used, peak: bytes.
        stretch: bytes of the largest tensor that there is a place for: what is free may lie in pieces.
        uploads: bytes that went to the device, by the shape of the tensor.
        waits: how often the host had to wait for what is there.
        kernels: how many it was asked for; those of one operation count as one, and views as none.
        pinned, kept: bytes of pinned host memory, and how many pieces of these are free again, by their size: torch
            keeps them for the next of that size.
        under_way: pinned memory that copies have yet to read or write.
    """

    def __init__(self, kind: str, size: int, stretch: float = math.inf) -> None:
        self.device = torch.device(kind, 0)
        self.size, self.used, self.peak, self.stretch = size, 0, 0, stretch
        self.uploads: Counter = Counter()
        self.waits = self.kernels = 0
        self.pinned, self.kept = 0, Counter[int]()
        self.under_way: weakref.WeakSet[Pinned] = weakref.WeakSet()

    def take(self, size: int) -> None:
        if self.used + size > self.size or size > self.stretch:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size:,} bytes (rehearsed).")
        self.used += size
        self.peak = max(self.peak, self.used)

    def wait(self) -> None:
        """Whatever was asked for is done."""
        for memory in self.under_way:
            memory.written.clear()
            memory.read.clear()
        self.under_way.clear()

    def give_back_pinned(self) -> None:
        """As `torch._C._host_emptyCache` does."""
        self.pinned -= sum(size * count for size, count in self.kept.items())
        self.kept.clear()


class Resident:
    """The mark on a storage; its bytes are free again when the storage goes."""

    def __init__(self, device: Device, size: int) -> None:
        self.device, self.size = device, 0
        device.take(size)
        self.size = size

    def __del__(self) -> None:
        self.device.used -= self.size


class Pinned:
    """The mark on a storage that the system may not move, and what copies have yet to do there."""

    def __init__(self, device: Device, size: int) -> None:
        self.device, self.size = device, 1 << max(size - 1, 0).bit_length()
        self.written, self.read = list[range](), list[range]()  # bytes, by copies under way
        if device.kept[self.size]:
            device.kept[self.size] -= 1
        else:
            device.pinned += self.size

    def __del__(self) -> None:
        self.device.kept[self.size] += 1

    def leave(self, tensor: Tensor, *, written: bool) -> None:
        """A copy that nobody waits for writes a tensor in this memory, or reads it."""
        (self.written if written else self.read).append(bytes_of(tensor))
        self.device.under_way.add(self)

    def check(self, tensor: Tensor, *, writing: bool) -> None:
        """The host reads, or writes."""
        mine = bytes_of(tensor)
        if any(
            max(mine.start, other.start) < min(mine.stop, other.stop)
            for other in (*self.written, *(self.read if writing else ()))
        ):
            raise RuntimeError("the host did not wait for a copy from or to this pinned memory (rehearsed)")


def bytes_of(tensor: Tensor) -> range:
    """Where a tensor lies in its storage, from the first byte to the last."""
    first = tensor.storage_offset()
    count = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return range(first * tensor.itemsize, (first + count * (tensor.numel() > 0)) * tensor.itemsize)


def pinned(tensor: Tensor) -> Pinned | None:
    storage = storage_of(tensor)
    return None if storage is None else getattr(storage, PINNED, None)


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return None if tensor.is_meta or tensor.layout != torch.strided else tensor.untyped_storage()


def resident(tensor: Tensor) -> bool:
    """Whether a tensor is marked as on the device."""
    storage = storage_of(tensor)
    return storage is not None and hasattr(storage, MARK)


def take_off(tensor: Tensor) -> Tensor:
    storage = storage_of(tensor)
    if storage is not None and hasattr(storage, MARK):
        delattr(storage, MARK)
    return tensor


def tensors_in(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = [*value.values()]
    return [t for part in value for t in tensors_in(part)] if isinstance(value, list | tuple) else []


class Placed(TorchFunctionMode):
    """Python's view: where tensors are, and where they are made."""

    def __init__(self, gpu: Device) -> None:
        super().__init__()
        self.gpu, getter = gpu, lambda name: getattr(Tensor, name).__get__
        self.crossing = ""  # a copy is made for the device, which may read what is under way, or for the host
        self.handlers = {
            getter("device"): lambda f, a, k: gpu.device if resident(a[0]) else f(*a),
            getter("is_cuda"): lambda f, a, k: resident(a[0]) and gpu.device.type == "cuda",
            Tensor.get_device: lambda f, a, k: 0 if resident(a[0]) else f(*a),
            Tensor.to: self.to,
            Tensor.cuda: lambda f, a, k: self.moved(a[0], gpu.device),
            Tensor.cpu: lambda f, a, k: self.moved(a[0], CPU),
            Tensor.is_pinned: lambda f, a, k: pinned(a[0]) is not None,
            Tensor.data_ptr: self.read_by_host,
            Tensor.numpy: self.no_numpy,
            Tensor.__array__: self.no_numpy,
            Tensor.__deepcopy__: self.copied,
            Tensor.tolist: self.awaited,
        }

    def put(self, tensor: Tensor) -> Tensor:
        storage = storage_of(tensor)
        if storage is not None and not hasattr(storage, MARK):
            if self.gpu.device.type == "mps" and tensor.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype (rehearsed)")
            setattr(storage, MARK, Resident(self.gpu, storage.nbytes()))
        return tensor

    def moved(self, tensor: Tensor, device=None, dtype=None, copy=False, form=None, later=False) -> Tensor:
        """`tensor.to(device, dtype)`; with `later` nobody waits for a copy out of pinned memory."""
        options, dtype = {} if form is None else {"memory_format": form}, dtype or tensor.dtype
        if tensor.is_meta or (device is not None and device.type not in ("cpu", self.gpu.device.type)):
            return tensor.to(device=device, dtype=dtype, copy=copy, **options)
        here = resident(tensor)
        there = here if device is None else device.type != "cpu"
        if here == there:
            return tensor.to(dtype, copy=copy, **options)
        self.crossing = "there" if there else "back"
        try:
            result = tensor.to(dtype, copy=True, **options)
        finally:
            self.crossing = ""
        self.gpu.waits += here
        if there and later and (memory := pinned(tensor)) is not None:
            memory.leave(tensor, written=False)
        else:
            self.gpu.wait()
        if there:
            self.gpu.uploads[tuple(tensor.shape)] += tensor.numel() * dtype.itemsize
        return self.put(result) if there else take_off(result)

    def to(self, _func, args, kwargs) -> Tensor:
        tensor, *rest = args
        kwargs = dict(kwargs)
        copy, other = kwargs.pop("copy", False), kwargs.pop("other", None)
        if rest and isinstance(rest[0], Tensor):
            other = rest[0]
        if other is not None:
            device = self.gpu.device if resident(other) else other.device
            return self.moved(tensor, device, other.dtype, copy, kwargs.get("memory_format"))
        if len(rest) == 4:
            copy = rest.pop()
        device, dtype, later, form = torch._C._nn._parse_to(*rest, **kwargs)
        return self.moved(tensor, device, dtype, copy, form, later)

    def no_numpy(self, func, args, kwargs):
        if resident(args[0]):
            raise TypeError(f"can't convert {self.gpu.device} tensor to numpy. Use Tensor.cpu() first (rehearsed).")
        return self.read_by_host(func, args, kwargs)

    def read_by_host(self, func, args, kwargs):
        if (memory := pinned(args[0])) is not None:
            memory.check(args[0], writing=False)
        return func(*args, **kwargs)

    def copied(self, func, args, kwargs):
        result = func(*args, **kwargs)  # copies the storage, behind the dispatcher's back
        return self.put(result) if resident(args[0]) else result

    def awaited(self, func, args, kwargs):
        self.gpu.waits += resident(args[0])
        return func(*args, **kwargs)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        try:
            handler = self.handlers.get(func)
        except TypeError:  # cannot be hashed
            handler = None
        if handler is not None:
            return handler(func, args, kwargs)
        if kwargs.get("pin_memory"):
            result = func(*args, **{**kwargs, "pin_memory": False})
            setattr(result.untyped_storage(), PINNED, Pinned(self.gpu, result.untyped_storage().nbytes()))
            return result
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        device = kwargs["device"]
        device = self.gpu.device if isinstance(device, int) else torch.device(device)
        if device.type == "meta":
            return func(*args, **kwargs)
        result = func(*args, **{**kwargs, "device": CPU})
        for tensor in tensors_in(result):
            take_off(tensor) if device.type == "cpu" else self.put(tensor)
        return result


CROSSING = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}


def computes(func) -> bool:
    """Whether an operation is more than a view of its arguments, or room for what is yet to come."""
    seen = any(made.alias_info is not None and not made.alias_info.is_write for made in func._schema.returns)
    return not seen and "empty" not in func.name()


class Kernels(TorchDispatchMode):
    """ATen's view: every kernel, and what its tensors are on."""

    def __init__(self, placed: Placed) -> None:
        super().__init__()
        self.placed, self.gpu = placed, placed.gpu
        # What a CPU does not do as a GPU does.
        self.other = {aten.mm.dtype: self.wide_product, aten.histc.default: self.histogram}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            tensors = [t for t in tensors_in(args) + tensors_in(kwargs) if not t.is_meta]
            marks = [resident(t) for t in tensors]
            if not any(marks):
                if self.placed.crossing != "there" and computes(func):
                    self.touched_by_host(func, args, tensors)
                return func(*args, **kwargs)
            if func in CROSSING:
                result = func(*args, **kwargs)
                if func is aten.copy_.default:
                    self.copied(*args, **kwargs)
                # A conversion stays where it was; another device is the other mode's doing.
                stays = func is aten._to_copy.default and not self.placed.crossing
                return self.placed.put(result) if stays else result
            self.check(func, args, tensors, marks)
            result = self.other.get(func, func)(*args, **kwargs)
            for tensor in tensors_in(result):
                self.placed.put(tensor)
            by_mask = func in INDEXING and any(t.dtype == torch.bool for t in tensors_in(args[1]))
            if func in WAITING or by_mask:
                self.gpu.waits += 1
                self.gpu.wait()
            self.gpu.kernels += computes(func)
            return result

    def touched_by_host(self, func, args, tensors: list[Tensor]) -> None:
        writes = [bool(a.alias_info and a.alias_info.is_write) for a in func._schema.arguments]
        written = [t for given, writing in zip(args, writes, strict=False) if writing for t in tensors_in(given)]
        for tensor in tensors:
            if (memory := pinned(tensor)) is not None:
                memory.check(tensor, writing=any(tensor is t for t in written))

    def copied(self, into: Tensor, values: Tensor, later: bool = False) -> None:
        """What a copy has left under way, one between the device and the host or on the device."""
        memory = pinned(into) or pinned(values)
        if memory is not None and later:
            written = pinned(into) is memory
            memory.leave(into if written else values, written=written)
        elif not (resident(into) and resident(values)):
            self.gpu.wait()

    def wide_product(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        """CUDA alone has it: half-precision operands, summed in float32."""
        if self.gpu.device.type != "cuda" or a.dtype != b.dtype or a.dtype.itemsize != 2:
            raise RuntimeError(
                f"mm with out_dtype: expected two half-precision device tensors, got {a.dtype}, {b.dtype}"
            )
        return torch.mm(a.to(dtype), b.to(dtype))

    def histogram(self, values: Tensor, *args, **kwargs) -> Tensor:
        """CUDA counts integers as well."""
        return torch.histc(values.double(), *args, **kwargs).to(values.dtype)

    def check(self, func, args, tensors: list[Tensor], marks: list[bool]) -> None:
        if func in INDEXING:
            here = resident(args[0])
            if not here and any(resident(t) for t in tensors_in(args[1])):
                raise RuntimeError("indices should be on the cpu, as the indexed tensor is (rehearsed)")
            if any(resident(t) != here and not (t.dim() == 0 and here) for t in tensors_in(args[2:3])):
                raise RuntimeError(f"{func}: expected values on the device of the indexed tensor (rehearsed)")
            return
        strangers = [t for t, mark in zip(tensors, marks, strict=True) if not mark]
        if any(t.dim() > 0 for t in strangers) or (len(strangers) > 1 and func is not aten.where.self):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device (rehearsed)")


@contextmanager
def rehearsed(kind: str = "cuda", memory: float = 80e9, stretch: float = math.inf) -> Iterator[Device]:
    """Simulates a device of that kind with so many bytes, as long as the context lasts.

    Args:
        kind: "cuda" or "mps".
        memory: bytes that it has.
        stretch: bytes of the largest tensor that finds a place, however many are free.
    """
    gpu = Device(kind, int(memory), stretch)
    properties = types.SimpleNamespace(name="rehearsed", total_memory=gpu.size, major=9, minor=0)
    cuda = {
        "is_available": lambda: kind == "cuda",
        "is_initialized": lambda: kind == "cuda",
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda _device=None: gpu.wait(),
        "empty_cache": lambda: None,
        "get_device_name": lambda _device=None: "rehearsed",
        "get_device_capability": lambda _device=None: (9, 0),
        "get_device_properties": lambda _device=None: properties,
        "mem_get_info": lambda _device=None: (gpu.size - gpu.used, gpu.size),
        "memory_allocated": lambda _device=None: gpu.used,
        "memory_reserved": lambda _device=None: gpu.used,
    }
    placed = Placed(gpu)
    with (
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.object(torch.backends.mps, "is_available", lambda: kind == "mps"),
        mock.patch.object(torch.accelerator, "synchronize", lambda _device=None: gpu.wait()),
        mock.patch.object(torch._C, "_host_emptyCache", gpu.give_back_pinned, create=True),
        # Large products would take a CPU minutes; another process has no such device.
        mock.patch("snp_llm.cli.estimates.matmul_rates", lambda _device, dtypes: dict.fromkeys(dtypes, 1e13)),
        mock.patch("snp_llm.cli.prune.place_for_another", lambda _device, _size: CPU),
        Kernels(placed),
        placed,
    ):
        yield gpu
