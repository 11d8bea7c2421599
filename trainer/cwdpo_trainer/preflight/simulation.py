"""Simulates a training step on fake tensors, to predict the memory that it allocates on the device.

The model is built from its config without weights, with the run's dtype, frozen modules and adapter. Then the parts of
a step that allocate memory run in their usual order: optimizer state, reference, forward and backward of each
micro-step, clipping and the optimizer's update. A ledger adds up the live tensors (ledger.py).

Not counted: the device's runtime (about 0.5 GiB for torch and a CUDA context), buffers inside torch's kernels,
fragmentation, probes and sampling. With several processes, each is planned as if it were alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Trainer

from cwdpo_kernels import (
    Cooling,
    Head,
    linear_constrained_sft_loss,
    linear_preference_loss,
    linear_sequence_logprob,
)
from cwdpo_kernels.integrations.hugging_face import attach_head_unmeasured, evaluating
from cwdpo_kernels.integrations.shared_prefix import enable_trees
from cwdpo_trainer.config.arguments import LoraArguments, ModelArguments
from cwdpo_trainer.config.stage_arguments import DPOArguments, SFTArguments, StageArguments
from cwdpo_trainer.data.collator import Batch, PairCollator, SharedBatch, to_device
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.models.adapters import base_model, new_adapter, switched_adapter
from cwdpo_trainer.models.freezing import freeze, freeze_adapters
from cwdpo_trainer.models.kinds import EXPECTED, auto_class, read_config
from cwdpo_trainer.models.reading import loading
from cwdpo_trainer.preflight.ledger import Ledger
from cwdpo_trainer.preflight.parts import marked_modules, period_of, stacks_of

WEIGHTS, REFERENCE, GRADIENTS, OPTIMIZER, TEMPORARY = "weights", "reference", "gradients", "optimizer", "temporary"
ADAM_STATES = 2


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step by kind: weights, reference, gradients, optimizer, inputs, the activations of the model's parts,
    and temporary tensors of the backward.

    `peaks`: by phase of the step, the bytes of each kind when the phase's total is largest. `state`: bytes of the
    optimizer's state. `saved`: bytes of the weights in a checkpoint (with LoRA, only trained ones).
    `assumed_optimizer`: the optimizer cannot be simulated, so AdamW's state is counted.
    """

    peaks: dict[str, dict[str, float]]
    state: float
    saved: float
    assumed_optimizer: bool = False

    @property
    def moment(self) -> str:
        """The phase with the peak: `forward`, `backward` or `optimizer`."""
        return max(self.peaks, key=lambda phase: sum(self.peaks[phase].values())).split(":")[0]

    @property
    def peak(self) -> dict[str, int]:
        largest = max(self.peaks.values(), key=lambda peak: sum(peak.values()))
        return {kind: round(count) for kind, count in largest.items() if round(count) > 0}

    @property
    def total(self) -> int:
        return sum(self.peak.values())

    def extrapolated(self, start: StepMemory, end: StepMemory, times: float) -> StepMemory:
        """self + times * (end - start), entry by entry. `start` and `end` have the same phases."""

        def along(value: float, of_start: float, of_end: float) -> float:
            return value + times * (of_end - of_start)

        peaks = {
            phase: {
                kind: along(peak.get(kind, 0), start.peaks[phase].get(kind, 0), end.peaks[phase].get(kind, 0))
                for kind in {*peak, *end.peaks[phase]}
            }
            for phase, peak in self.peaks.items()
        }
        return replace(
            self, peaks=peaks, state=along(self.state, start.state, end.state),
            saved=along(self.saved, start.saved, end.saved),
        )  # fmt: skip


@dataclass
class Simulation:
    """A model without weights, ready for steps."""

    model: nn.Module
    fake: FakeTensorMode
    device: torch.device
    starts_with_adapter: bool

    def truncate(self, layers: dict[str, int]) -> None:
        """Shorten stacks of layers: `layers` maps a stack's name to the number of layers to keep."""
        for name, count in layers.items():
            parent, _, own = name.rpartition(".")
            setattr(self.model.get_submodule(parent), own, nn.ModuleList(stacks_of(self.model)[name][:count]))

    @classmethod
    def of(
        cls, settings: ModelArguments, path: str, lora: LoraArguments | None, device: torch.device,
    ) -> Simulation:  # fmt: skip
        """The model at `path` with the run's dtype, frozen modules and adapter. Raises `InputError`."""
        base = base_model(path)
        config = read_config(base)
        kind = auto_class(base, config)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        options: dict[str, Any] = {"dtype": loaded_dtype(settings, config)}
        if settings.attn_implementation is not None:
            options["attn_implementation"] = settings.attn_implementation
        adapter = base != path or (lora is not None and lora.adapter is not None)
        with torch.device("meta"):
            with loading(base, EXPECTED):
                model = kind.from_config(config, trust_remote_code=False, **options)
            if base != path:
                model = _with_config_of(model, path, settings.freeze)
            else:
                freeze(model, settings.freeze)
                if lora is not None and lora.adapter is not None:
                    model = _with_config_of(model, lora.adapter, settings.freeze)
                elif lora is not None:
                    model, _ = new_adapter(model, lora, settings.freeze)
                    freeze_adapters(model, settings.freeze)
        attach_head_unmeasured(model)
        _make_fake(model, fake, device)
        return cls(model, fake, device, adapter)

    def step(
        self, args: StageArguments, collator: PairCollator, rows: Sequence[Row], shared: bool, is_first: bool
    ) -> StepMemory:
        """The memory of a step of the stage `args`, whose micro-steps all run on the pairs `rows`.

        `shared`: prompts are encoded once for all their answers. `is_first`: the stage is the run's first one. Raises
        what the model raises.
        """
        ledger = Ledger(self.fake, self.device)
        model, trained = self.model.train(), self._trained()
        if shared:
            enable_trees(model)
            collator = collator.on_trees(model)
        enable_checkpointing(model, args)
        inputs = collator(rows)
        inputs["prompts"] = to_device(inputs["prompts"], self.device)
        ledger.own(model.parameters(), WEIGHTS)
        ledger.own(model.buffers(), WEIGHTS)
        ledger.own((v for v in inputs["prompts"].values() if isinstance(v, Tensor)), "inputs")
        ledger.add(REFERENCE, self._reference_bytes(is_first))
        with ledger, self._owned_gradients(ledger, trained), _marked(ledger, model):
            optimizer = self._optimizer(ledger, args, trained)
            state = ledger.live[OPTIMIZER]
            ledger.peaks.clear()
            for _ in range(min(2, args.gradient_accumulation_steps)):  # from the second on, gradients exist
                self._micro_step(ledger, args, collator, inputs)
            ledger.phase("optimizer")
            with ledger.kind(OPTIMIZER):
                if args.max_grad_norm:
                    nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
                if optimizer is not None:
                    optimizer.step()
        saved = unique_bytes(trained if isinstance(model, PeftModel) else [*model.parameters()])
        peaks: dict[str, dict[str, float]] = {phase: dict(peak) for phase, peak in ledger.peaks.items()}
        return StepMemory(peaks, state, saved, optimizer is None and bool(trained))

    def _micro_step(self, ledger: Ledger, args: StageArguments, collator: PairCollator, inputs: dict[str, Any]) -> None:
        ledger.phase("forward")
        with ledger.kind("inputs"):
            batch = collator.join(inputs["prompts"], inputs["chosen"], inputs["rejected"])
        with precision(args):
            sums = reference_sums(self.model, args, batch)
            loss = batch.run(self.model, loss_of(args, batch, *sums)).loss
        ledger.phase("backward")
        with ledger.kind(TEMPORARY):
            loss.backward()

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _reference_bytes(self, is_first: bool) -> int:
        """A frozen copy of the model; with LoRA, of the adapter, or nothing if the stage starts with a new adapter."""
        if not isinstance(self.model, PeftModel):
            return unique_bytes([*self.model.parameters(), *self.model.buffers()])
        starts_new = is_first and not self.starts_with_adapter
        return 0 if starts_new else unique_bytes(self._trained())

    def _optimizer(self, ledger: Ledger, args: StageArguments, trained: list[nn.Parameter]) -> Any:
        """The stage's optimizer with its state. None if it does not work on fake tensors; then AdamW's state is
        counted."""
        if not trained:
            return None
        with ledger.kind(OPTIMIZER):
            try:
                policy: Any = self.model
                kind, options = Trainer.get_optimizer_cls_and_kwargs(args, policy)
                optimizer = kind(trained, **options)
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
                optimizer.step()
                return optimizer
            except Exception:  # of any type: some optimizers read values, or need a certain device
                ledger.add(OPTIMIZER, ADAM_STATES * unique_bytes(trained))
                return None
            finally:
                for parameter in trained:
                    parameter.grad = None

    @contextlib.contextmanager
    def _owned_gradients(self, ledger: Ledger, trained: list[nn.Parameter]) -> Any:
        def own(parameter: nn.Parameter) -> None:
            if parameter.grad is not None:
                ledger.own([parameter.grad], GRADIENTS)

        handles = [parameter.register_post_accumulate_grad_hook(own) for parameter in trained]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in trained:
                parameter.grad = None


def predict_step(
    make: Callable[[], Simulation], args: StageArguments, collator: PairCollator, rows: Sequence[Row], shared: bool,
    is_first: bool,
) -> StepMemory:  # fmt: skip
    """`Simulation.step` of the model that `make` makes, faster if the model has many layers.

    Most models repeat one layer, or a short period of layers. The ledger has a phase for each of the first two and last
    two periods of a stack, forward and backward. The peak of each phase is linear in the number of periods, and periods
    in between never exceed the higher end. So the step runs with four and with five periods, and the peaks are
    extrapolated. A model that fails with fewer layers runs with all of them.
    """
    whole = make()
    stacks = stacks_of(whole.model)
    periods = {name: period_of(whole.model, layers) for name, layers in stacks.items()}
    folded = {name: period for name, period in periods.items() if period and len(stacks[name]) > 5 * period}
    given: Any = args.activation_checkpointing_kwargs
    options = dict(given or {})
    if not folded or options.get("every_n_layers", 1) != 1:
        return whole.step(args, collator, rows, shared, is_first)
    short = {name: 4 * period for name, period in folded.items()}
    try:
        base = result = _truncated(make, short).step(args, collator, rows, shared, is_first)
        for name, period in folded.items():
            longer = _truncated(make, {**short, name: 5 * period})
            more = longer.step(args, collator, rows, shared, is_first)
            result = result.extrapolated(base, more, len(stacks[name]) / period - 4)
        return result
    except Exception:  # of any type: a model that asks for a layer by its number, for example
        return whole.step(args, collator, rows, shared, is_first)


def _truncated(make: Callable[[], Simulation], layers: dict[str, int]) -> Simulation:
    simulation = make()
    simulation.truncate(layers)
    return simulation


def reference_sums(model: nn.Module, args: StageArguments, batch: Batch | SharedBatch) -> Sequence[Tensor]:
    """The reference's total log-probs of the chosen [P] and the rejected [P] answers, in nats.

    Empty for stage 1 and for losses without a reference. `model` itself serves as the reference, with LoRA off.
    """
    if not isinstance(args, DPOArguments) or not args.needs_reference:
        return ()
    adapter: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if isinstance(model, PeftModel):
        adapter = switched_adapter(model, None)
    with evaluating(model), torch.no_grad(), adapter:
        op = lambda hidden, head: linear_sequence_logprob(hidden, head, batch.labels, batch.cu_seqlens).total  # noqa: E731
        return batch.run(model, op).chunk(2)


def precision(args: StageArguments) -> torch.autocast:
    """The autocast context of a stage's forwards."""
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    return torch.autocast(args.device.type, dtype, enabled=args.bf16 or args.fp16)


def loss_of(args: StageArguments, batch: Batch | SharedBatch, *reference: Tensor) -> Callable[[Tensor, Head], Any]:
    """The loss of a stage, as its trainer computes it."""
    if isinstance(args, DPOArguments):
        loss = args.preference_loss(args.fixed_cooling or Cooling())
        return lambda hidden, head: linear_preference_loss(
            hidden, head, batch.labels, *reference, cu_seqlens=batch.cu_seqlens, loss=loss, normalize=args.normalize
        )
    assert isinstance(args, SFTArguments)
    negatives = args.gentle_negatives
    return lambda hidden, head: linear_constrained_sft_loss(
        hidden, head, batch.labels, negatives=negatives, cu_seqlens=batch.cu_seqlens
    )


@contextlib.contextmanager
def _marked(ledger: Ledger, model: nn.Module) -> Any:
    """Within this context, the ledger attributes tensors to the model's parts, and the ends of stacks are phases."""
    handles = ledger.mark_modules(marked_modules(model))
    for stack, layers in stacks_of(model).items():
        groups = len(layers) // (period_of(model, layers) or len(layers))
        size = len(layers) // groups
        for index, layer in enumerate(layers):
            own = index // size
            # A phase peaks at the same operation, however many layers there are: see `predict_step`.
            place = own if own < 2 else own - groups if own >= groups - 2 else "between"
            handles.append(layer.register_forward_pre_hook(_enter(ledger, f"{stack}:{place}")))
            handles.append(layer.register_forward_hook(_enter_backward(ledger, f"backward:{stack}:{place}")))
        handles.append(layers[-1].register_forward_hook(_enter(ledger, f"{stack}:after")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(ledger: Ledger, phase: str) -> Callable[..., None]:
    """A hook that starts a phase. Layers that checkpointing recomputes during the backward count as backward."""

    def hook(*_: Any) -> None:
        ledger.phase(f"{ledger.direction}:{phase}")

    return hook


def _enter_backward(ledger: Ledger, phase: str) -> Callable[..., None]:
    """A forward hook that makes the module's backward a phase."""

    def hook(module: nn.Module, given: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: ledger.phase(phase))

    return hook


def _with_config_of(model: Any, path: str, frozen: Sequence[str]) -> PeftModel:
    """A new adapter with the options of the one at `path`."""
    with loading(path, "an adapter that fits the model"):
        config = PeftConfig.from_pretrained(path)
        config.inference_mode = False
        policy = get_peft_model(model, config)
    freeze_adapters(policy, frozen)
    return policy


def _make_fake(model: nn.Module, fake: FakeTensorMode, device: torch.device) -> None:
    """Replace the tensors of a model on the meta device, in place, by fake ones on `device`. Tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        holders: list[Any] = [module._parameters, module._buffers]
        for tensors in holders:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    with fake:
                        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                    is_weight = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
                tensors[name] = made[id(tensor)]


def loaded_dtype(settings: ModelArguments, config: Any) -> torch.dtype:
    """The dtype of the weights of a model with this config."""
    dtype = settings.torch_dtype
    # The only string is `auto`, the dtype of the saved weights.
    return (config.dtype or config.get_text_config().dtype or torch.float32) if isinstance(dtype, str) else dtype


def enable_checkpointing(model: Any, args: StageArguments) -> None:
    """Turn activation checkpointing on as the library's trainer does, if `args` do."""
    if not args.activation_checkpointing:
        return
    given: Any = args.activation_checkpointing_kwargs
    options = dict(given or {})
    own = {key: options.pop(key) for key in ("every_n_layers", "offload") if key in options}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None, **own)
    else:  # transformers before 5.23
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None, **own)


def unique_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages of `tensors`, each once."""
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())
