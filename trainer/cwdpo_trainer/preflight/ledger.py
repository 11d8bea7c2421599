"""Counts the memory of a training step that runs on fake tensors.

Weights are fake tensors: they have a shape, a dtype and a device, but no data. Inputs are real: token ids, masks, image
grids and pixels. An operation with a fake argument gives a fake result; all others are computed. So a model can read
its inputs (find image tokens, unpack grids, make masks), and nothing large is computed.

Autograd runs as usual, so each tensor lives as long as in a real step. The ledger adds up the storages of all live
tensors, each once, and records the largest total.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

import cwdpo_kernels  # noqa: F401  # registers the ops
from cwdpo_trainer.preflight.memory import HeadStep

SMALL = 1 << 16  # elements: float tensors up to this size that depend on no weight are computed
_HEAD_OPS = ("linear_logprob", "linear_logprob_backward")


class Ledger(TorchDispatchMode):
    """A context that counts the tensors which operations create. `live`: bytes of live tensors by kind. `peaks`: by
    phase, the bytes of each kind when the phase's total was largest. Only tensors on `device` count.

    A tensor belongs to the kind in whose context (`kind`) it was created, unless `own` moves it to another.
    """

    def __init__(self, fake: FakeTensorMode, device: torch.device) -> None:
        super().__init__()
        self.fake, self.device = fake, device
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self._total = 0
        self._phase, self._highest = "", -1
        self._current = "inputs"
        self._kinds: dict[int, str] = {}  # by storage
        self._alive: dict[int, weakref.ref[Any]] = {}

    @contextlib.contextmanager
    def kind(self, name: str) -> Iterator[None]:
        """Within this context, new tensors are of the kind `name`."""
        before, self._current = self._current, name
        try:
            yield
        finally:
            self._current = before

    def mark_modules(self, modules: Iterable[tuple[str, nn.Module]]) -> list[RemovableHandle]:
        """Let tensors that a module's forward creates be of the kind given with it. Returns the hooks' handles."""
        before: list[str] = []
        handles = []
        for name, module in modules:

            def enter(*_: Any, name: str = name) -> None:
                before.append(self._current)
                self._current = name

            def leave(*_: Any) -> None:
                self._current = before.pop()

            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
        return handles

    def own(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count `tensors` as `kind`, whatever they were before."""
        for tensor in tensors:
            key = self._key(tensor)
            if key in self._alive:
                size = tensor.untyped_storage().nbytes()
                self.live[self._kinds[key]] -= size
                self.live[kind] += size
                self._kinds[key] = kind
            else:
                self._add(tensor, kind)

    def add(self, kind: str, size: int) -> None:
        """Count `size` bytes as `kind` until the end: nothing frees them."""
        self._change(kind, size)

    @property
    def direction(self) -> str:
        """The start of the current phase's name, up to a colon: `forward`, `backward` or `optimizer`."""
        return self._phase.partition(":")[0]

    def phase(self, name: str) -> None:
        """Start or continue the phase `name`."""
        self._phase = name
        self._highest = sum(self.peaks[name].values()) if name in self.peaks else -1
        self._change("", 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors) or (not tensors and _is_large(func, kwargs, args)):
            with self.fake:
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        name = func._schema.name
        if name.startswith("cwdpo::"):
            out = self._of_head(name.removeprefix("cwdpo::"), args, kwargs, out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf, self._current)
        return out

    def _of_head(self, op: str, args: Any, kwargs: Any, out: Any) -> Any:
        """Count the memory that an op of the head uses only while it runs, which its fake version does not allocate."""
        if op not in _HEAD_OPS:
            return out
        given = _arguments(op, args, kwargs)
        hidden, weight = given["hidden"], given["weight"]
        labels = given["labels"]
        is_known = not isinstance(labels, FakeTensor)
        labeled = int((labels != given["ignore_index"]).sum()) if is_known else labels.numel()
        step = HeadStep(1, hidden.shape[0], labeled, weight.shape[0], weight.shape[1])
        self._change("head", step.fused(self.device.type))
        self._change("head", -step.fused(self.device.type))
        if op == "linear_logprob_backward" and given["needs_weight"] and given["kept"].dim() == 2:
            # A real backward writes the gradient of the weight into the memory of the kept tiles.
            return (out[0], given["kept"].data, out[2])
        return out

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _add(self, tensor: Tensor, kind: str) -> None:
        if tensor.layout != torch.strided or tensor.device.type != self.device.type:
            return
        storage, key = tensor.untyped_storage(), self._key(tensor)
        if key in self._alive:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            del self._alive[key]
            self._change(self._kinds.pop(key), -size)

        self._kinds[key] = kind
        self._alive[key] = weakref.ref(storage, freed)
        self._change(kind, size)

    def _change(self, kind: str, size: int) -> None:
        self.live[kind] += size
        self._total += size
        if self._total > self._highest:
            self._highest = self._total
            self.peaks[self._phase] = self.live.copy()


def _is_large(func: Any, kwargs: dict[str, Any], args: Any) -> bool:
    """Whether an operation without tensor arguments makes a large tensor of floats."""
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    shape = args[0] if args and isinstance(args[0], list | tuple) else ()
    return dtype.is_floating_point and torch.Size(shape).numel() > SMALL


def _arguments(op: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call of an op, by name."""
    schema = getattr(torch.ops.cwdpo, op).default._schema
    return {**dict(zip((each.name for each in schema.arguments), args, strict=False)), **kwargs}
