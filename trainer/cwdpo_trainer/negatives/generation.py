"""Generation with each prompt encoded once for all its samples.

transformers' `generate(num_return_sequences=k)` encodes k copies of each prompt. `continuations` encodes each prompt
once, up to its last token, repeats the keys and values, and lets `generate` continue from there. With the same random
state, the samples are those of plain `generate`, unless rounding changes a draw.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from cwdpo_kernels.integrations.hugging_face import rounding_tolerance
from cwdpo_trainer.errors import describe
from cwdpo_trainer.reporter import say

GeneratingModel = Any  # what `freeze_reference` and `load_model` return, maybe wrapped: has `generate` and `device`
_POSITIONS = "rope_deltas"  # where models with M-RoPE keep the offset from index to position of each row's next tokens
_can_share: weakref.WeakKeyDictionary[GeneratingModel, bool] = weakref.WeakKeyDictionary()


def continuations(
    model: GeneratingModel, inputs: dict[str, Tensor], samples: int, shares_prompts: bool, **options: Any
) -> Tensor:
    """Draw `samples` continuations of each of P prompts.

    Args:
        model: in evaluation mode, without gradients
        inputs: a processor's outputs for P prompts, padded on the left
        samples: continuations of each prompt
        shares_prompts: encode each prompt once. The first call for a model compares the next token's log-probs with
            those of plain `generate`. If they differ by more than rounding, it says so, and this and all later calls
            encode the prompt for each sample.
        options: those of `generate`

    Returns tokens [P * samples, T]: prompt and continuation, those of one prompt next to each other. Raises what
    `generate` raises.
    """
    if shares_prompts and samples > 1 and _ends_in_text(model, inputs["input_ids"]):
        if model not in _can_share:
            _can_share[model] = _is_exact(model, inputs, options)
        if _can_share[model]:
            options["num_return_sequences"] = 1  # the inputs have each prompt `samples` times
            return model.generate(**_encoded_once(model, inputs, samples, options), **options)
    return model.generate(**inputs, num_return_sequences=samples, **options)


def _owner(model: GeneratingModel) -> Any:
    """The model with the weights and the config: for an `AdapterReference`, its policy."""
    return getattr(model, "policy", model)


def _ends_in_text(model: GeneratingModel, ids: Tensor) -> bool:
    """Whether the prompts have at least two tokens, and none ends in an image placeholder, as the last token is encoded
    without images."""
    image = getattr(_owner(model).config, "image_token_id", -1)
    return ids.shape[1] > 1 and not bool((ids[:, -1] == image).any())


def _encoded_once(
    model: GeneratingModel, inputs: dict[str, Tensor], samples: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Inputs of `generate`: each prompt `samples` times, with the keys and values of all its tokens except the last."""
    shape = inputs["input_ids"].shape
    of_tokens = {key: value for key, value in inputs.items() if value.shape[:2] == shape}
    prefix = {key: value[:, :-1] if key in of_tokens else value for key, value in inputs.items()}
    cache = model.generate(**prefix, **_one_token(options)).past_key_values
    cache.batch_repeat_interleave(samples)
    for module in _owner(model).modules():
        positions = getattr(module, _POSITIONS, None)
        if isinstance(positions, Tensor):
            setattr(module, _POSITIONS, positions.repeat_interleave(samples, 0))
    repeated = {key: value.repeat_interleave(samples, 0) for key, value in of_tokens.items()}
    return {**repeated, "past_key_values": cache}


def _one_token(options: dict[str, Any]) -> dict[str, Any]:
    """`options` changed so that `generate` takes the most likely token, one only, and returns its logits."""
    kept = {key: value for key, value in options.items() if key not in ("temperature", "top_p", "top_k")}
    one = {"max_new_tokens": 1, "num_return_sequences": 1, "do_sample": False}
    return kept | one | {"return_dict_in_generate": True, "output_logits": True}


def _is_exact(model: GeneratingModel, inputs: dict[str, Tensor], options: dict[str, Any]) -> bool:
    """Whether the next token's log-probs equal those of plain `generate`, within rounding. If not, says why."""
    once = _one_token(options)
    own = model.generate(**inputs, **once).logits[0]
    try:
        logits = model.generate(**_encoded_once(model, inputs, 2, options), **once).logits[0]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's own code may raise any type on a cache that it does not expect
        name = type(_owner(model)).__name__
        say(f"sampling: prompts are not shared: {name} fails with a prompt encoded once: {describe(error)}")
        return False
    own, logits = own.float().log_softmax(-1).repeat_interleave(2, 0), logits.float().log_softmax(-1)
    difference = (own - logits)[own.isfinite()].abs().max().item()
    tolerance = rounding_tolerance(own[own.isfinite()].abs().max().item(), _owner(model).dtype)
    if not difference <= tolerance:
        name = type(_owner(model)).__name__
        say(f"sampling: prompts are not shared: {name}'s log-probs would be off by {difference:.2g} nats")
    return difference <= tolerance
