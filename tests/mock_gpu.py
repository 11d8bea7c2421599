"""A GPU for tests on a machine without one: its tensors say that they are on "cuda" and hold their values on the CPU.

    with mock_gpu.running():
        torch.randn(3, device="cuda")

What a GPU refuses raises here too: tensors of several devices in one call, a CPU's random generator for values on the
GPU, `numpy()`, and a kernel whose tensors are not on the current GPU. Autocast of the CPU leaves GPU tensors alone, and
so does CUDA's here. Our ops run the kernels and launchers of the backend of "cuda"; Triton's interpreter runs the
launches. Memory and time are the CPU's. The transforms of torch.func do not work on these tensors.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from cwdpo_kernels.ops import registry

INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray)
_LATEST = collections.deque([torch.device("cuda", 0)], maxlen=1)  # the GPU of the latest op
CPU, DEVICES = torch.device("cpu"), 2  # cuda:0 and cuda:1
COPIES = ("copy_", "_to_copy", "_copy_from", "set_")  # may have tensors of two devices
INDEXED = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")  # indices may be on the CPU


class GPUTensor(torch.Tensor):
    """To PyTorch's C++ it is a meta tensor whose calls go the way of CUDA tensors: autograd and autocast are CUDA's."""

    def __new__(cls, values: torch.Tensor, device: torch.device) -> GPUTensor:
        shape = torch.empty_strided(values.size(), values.stride(), dtype=values.dtype, device="meta")
        return torch.Tensor._make_subclass(cls, shape, False, device_for_backend_keys=device)

    def __init__(self, values: torch.Tensor, device: torch.device) -> None:
        self.values, self.place = values, device

    device = property(lambda self: self.place)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def get_device(self) -> int:
        return self.place.index

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def tolist(self) -> list:
        return self.values.tolist()

    def numpy(self, **_) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def __repr__(self, **_) -> str:
        return f"{self.values!r} on {self.place}"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return call(op, args, kwargs or {})


class Generator(torch.Generator):
    """A random generator of a device; its values come from the CPU's."""

    def __new__(cls, device: str | torch.device = "cpu") -> Generator:
        return super().__new__(cls)

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.place = torch.device(device)

    device = property(lambda self: self.place)


class _Calls(TorchFunctionMode):
    """Python's calls, before C++ asks for a device guard of "cuda": with an index there is no need for one."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not torch.device:
            args, kwargs = pytree.tree_map_only((str, torch.device), _with_index, (args, kwargs))
        if (generator := kwargs.get("generator")) is not None:
            _check_generator(generator, kwargs.get("device"), args)
        if function is torch.Tensor.cuda:
            return args[0].to(_with_index(torch.device("cuda", *args[1:2])))
        if function in INDEXING:
            args = args[0], _without_lists(args[1]), *args[2:]
        if function in FROM_DATA and (device := kwargs.get("device")) is not None:
            gradient = kwargs.pop("requires_grad", False)
            return function(*args, **kwargs | {"device": CPU}).to(device).requires_grad_(gradient)
        return function(*args, **kwargs)


class _Ops(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return call(op, args, kwargs or {})


def call(op, args: tuple, kwargs: dict):
    """Run an op on the values of its arguments. The result is on the device that a GPU would put it on."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    name = op.__name__.split(".")[0]
    given = [x for x in flat if isinstance(x, torch.Tensor)]
    devices = {x.device for x in given}
    if any(device.type == "meta" for device in devices):
        raise NotImplementedError(f"mock_gpu: expected tensors with values, got one that C++ put on 'meta' ({op})")
    _LATEST.extend(x for x in devices if x.type == "cuda")
    # In C++ a GPUTensor is on "meta", so that is where C++ puts new tensors of its own: for those of the latest op.
    asked = [_LATEST[-1] if x.type == "meta" else _with_index(x) for x in flat if isinstance(x, torch.device)]
    if len(devices) > 1 and name not in COPIES:
        rest = [x for x in args if isinstance(x, torch.Tensor)] if name in INDEXED else given  # without the indices
        outside = {x.device for x in rest if x.device.type == "cpu" and x.dim()}
        if outside or len({x for x in devices if x.type == "cuda"}) > 1:
            found = " and ".join(sorted(map(str, devices)))
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two: {found} ({op})")
    mine = [x.device for x in given if isinstance(x, GPUTensor)]
    device = asked[0] if asked else given[0].device if name in COPIES else mine[0] if mine else CPU
    if op.namespace == "cwdpo" and mine:
        return _kernel(op, args, kwargs)
    if (
        op._opname in ("mm", "addmm") and "dtype" in op._overloadname
    ):  # products of half precision in float32, which a CPU lacks
        return _product(op, args, kwargs)
    inner_args, inner_kwargs = pytree.tree_unflatten([_on_cpu(x, device) for x in flat], spec)
    result = op(*inner_args, **inner_kwargs)
    if device.type != "cuda":
        return result
    wrap = lambda x: GPUTensor(x, device) if isinstance(x, torch.Tensor) and not isinstance(x, GPUTensor) else x  # noqa: E731
    return return_and_correct_aliasing(op, args, kwargs, pytree.tree_map(wrap, result))


def _kernel(op, args: tuple, kwargs: dict):
    """Call the kernel of the backend that serves the device, as PyTorch's dispatcher would.

    An op made of other ops, such as token_stats, is one function for all devices, in the op's file.
    """
    schema = op._schema.arguments
    values = {x.name: x.default_value for x in schema if x.has_default_value()} | kwargs
    values |= {x.name: value for x, value in zip(schema, args, strict=False)}
    name = op._schema.name.split("::")[1]
    serving = registry._BACKENDS[registry.backend("cuda")].kernels
    kernel = serving.get(name) or registry._fallback().kernels.get(name)
    kernel = kernel or getattr(importlib.import_module(f"cwdpo_kernels.ops.{name}"), name)
    with _Ops(), _Calls():
        return kernel(*(values[x.name] for x in schema))


def _product(op, args: tuple, kwargs: dict):
    """`mm` or `addmm` of half-precision tensors with a float32 result."""
    *matrices, dtype = args[: 4 if op._opname == "addmm" else 3]
    result = getattr(torch, op._opname)(*(x.values.to(dtype) for x in matrices))
    out = kwargs.get("out")
    if out is None:
        return GPUTensor(result, args[0].device)
    out.values.copy_(result)
    return out


def _launched(launch: Callable) -> Callable:
    """A launch in Triton's interpreter, whose tensors have to be on the current GPU."""

    def call_with_values(self, *args, **kwargs):
        current = torch.device("cuda", torch.cuda.current_device())

        def values(x: object) -> object:
            if isinstance(x, TensorDescriptor):
                return dataclasses.replace(x, base=values(x.base))
            if isinstance(x, torch.Tensor) and x.device != current:
                raise ValueError(
                    f"Pointer argument cannot be accessed from Triton: on {x.device}, launched on {current}"
                )
            return x.values if isinstance(x, GPUTensor) else x

        with torch.device("cpu"):
            return launch(self, *map(values, args), **{name: values(x) for name, x in kwargs.items()})

    return call_with_values


def _without_lists(index: object) -> object:
    """An index with tensors in place of lists: C++ would put them on "meta"."""
    if isinstance(index, tuple):
        return tuple(map(_without_lists, index))
    return torch.tensor(index, device=CPU) if isinstance(index, list) else index


def _check_generator(generator: torch.Generator, device: str | torch.device | None, args: tuple) -> None:
    tensors = (x.device for x in args if isinstance(x, torch.Tensor))
    expected, found = torch.device(device or next(tensors, CPU)).type, generator.device.type
    if expected != found:
        raise RuntimeError(f"Expected a '{expected}' device type for generator but found '{found}'")


def _with_index(device: str | torch.device) -> str | torch.device:
    """The current GPU for "cuda"."""
    current = device == "cuda" if isinstance(device, str) else device == torch.device("cuda")
    return torch.device("cuda", torch.cuda.current_device()) if current else device


def _on_cpu(x: object, device: torch.device) -> object:
    if isinstance(x, GPUTensor):
        return x.values
    return CPU if isinstance(x, torch.device) and device.type == "cuda" else x


@contextlib.contextmanager
def running() -> Iterator[list[int]]:
    """Yields the stack of current devices, [0] at first, which torch.cuda.device changes."""
    current = [0]

    class Device:
        def __init__(self, device: int | str | torch.device) -> None:
            index = device if isinstance(device, int) else torch.device(device).index
            self.index = current[-1] if index is None else index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *error: object) -> None:
            current.pop()

    with (
        mock.patch.object(torch, "Generator", Generator),
        mock.patch.object(torch.cuda, "_lazy_init", return_value=None),
        mock.patch.object(torch.cuda, "device", Device),
        mock.patch.object(torch.cuda, "current_device", side_effect=lambda: current[-1]),
        mock.patch.object(torch.cuda, "device_count", return_value=DEVICES),
        mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", return_value=False),
        mock.patch.object(interpreter.GridExecutor, "__call__", _launched(interpreter.GridExecutor.__call__)),
        _Ops(),
        _Calls(),
    ):
        yield current
