"""What `benchmarks.gpu` does, item by item and in order, with the time limit of each. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from benchmarks.models import Shape

PARTS = ("values", "ours", "limits", "logits", "other", "sharing", "peers", "tests")
OURS = "ours"  # the process of everything but peers and tests
VALUES = ("bfloat16", "bfloat16, p 0.999", "float16, bias, softcap 30", "float32")
CHECKED = VALUES[:2]  # our timings are in bfloat16: these values have to be right first
LINEAR = ("no_grad", "frozen", "trainable", "trainable, none kept", "trainable, 4 GiB kept")
LOGITS = ("logits forward", "logits")
OTHER = ("token_stats", "token_divergence", "half of the gradients 0, dense", "half of the gradients 0, sparse")
PROMPTS = ("8192 : 512", "8192 : 1024", "8192 : 2048", "16384 : 1024", "16384 : 2048", "16384 : 4096")
MODES = ("frozen", "trainable")
# Peer -> the module that it needs. benchmarks/peers.py has the calls.
PEERS: dict[str, str | None] = {
    "eager, full logits": None, "torch.compile, full logits": None, "torch linear_cross_entropy": None,
    "torch linear_cross_entropy, chunked": None, "cut-cross-entropy": "cut_cross_entropy",
    "Liger fused linear DPO": "liger_kernel", "Liger scaled cross-entropy": "liger_kernel",
    "Liger linear cross-entropy, CuTe": "liger_kernel", "QuACK linear cross-entropy": "quack",
    "TRL chunked log-prob": "trl",
}  # fmt: skip
TESTS = {"tests, kernels compiled ahead": "compile", "tests": "run", "tests, compute-sanitizer": "sanitizer"}
# Seconds that an item of a kind may take, compilation included: 1 to 5 s for a kernel of ours, a minute for some peers.
LIMITS = {
    "start": 120, "compile": 240, "values": 120, "linear": 120, "limits": 90, "logits": 90, "sharing": 120, "peer": 120,
    "tests": 600, "install": 120, "tune compile": 600, "tune": 60,
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One thing to do, in the child process `process`. `kind` selects the function of benchmarks/gpu_work.py."""

    name: str
    part: str
    kind: str
    op: str = ""
    shapes: tuple[Shape, ...] = ()
    process: str = OURS

    @property
    def timed(self) -> bool:
        """Whether it times an op of ours."""
        return self.kind in ("linear", "logits")

    def request(self) -> dict:
        """What the child process receives."""
        return asdict(self)


def plan(
    shapes: Sequence[Shape], parts: Sequence[str] = PARTS, peers: Mapping = PEERS, prompts: Sequence[str] = PROMPTS
) -> list[Item]:
    """The items of `parts` in order: values, our timings, limits of the device, our other ops, steps with shared
    prompts, peers, tests."""

    def timings(part: str, kind: str, ops: Sequence[str]) -> list[Item]:
        return [Item(f"{shape.name}, {op}", part, kind, op, (shape,)) for shape in shapes for op in ops]

    items = [
        Item("kernels compiled ahead", "values", "compile", shapes=tuple(shapes)),
        *(Item(f"values, {case}", "values", "values", case) for case in VALUES),
        *timings("ours", "linear", LINEAR),
        *(Item(f"{shape.name}, limits", "limits", "limits", shapes=(shape,)) for shape in shapes),
        *timings("logits", "logits", LOGITS),
        *(item for op in OTHER for item in timings("other", "linear", (op,))),
        *(Item(f"shared prompts, {each}", "sharing", "sharing", each, process="sharing") for each in prompts),
        *(
            Item(f"{shape.name}, {peer}, {mode}", "peers", "peer", f"{peer}, {mode}", (shape,), process=peer)
            for peer in peers
            for shape in shapes
            for mode in MODES
        ),
        *(Item(name, "tests", "tests", op, process="tests") for name, op in TESTS.items()),
    ]
    return [item for item in items if item.part in parts]
