"""Fused kernels from hidden states (or logits) to log-probabilities and the Cooling-Weighted DPO loss."""

from .functional import (
    linear_logprob,
    linear_sequence_logprob,
    logits_logprob,
    logits_sequence_logprob,
    sequence_logprob,
    shift_labels,
    token_divergence,
    token_stats,
)
from .losses import (
    constrained_sft_loss,
    cooling_weight,
    cwdpo_loss,
    linear_constrained_sft_loss,
    linear_cwdpo_loss,
    logits_cwdpo_loss,
)
from .ops import backend, backend_details, default_workspace_bytes, missing_backend
from .preference import (
    PREFERENCE_LOSSES,
    CoolingWeighted,
    PreferenceLoss,
    linear_preference_loss,
    preference_loss,
)
from .trees import TokenTree, tree_attention
from .types import (
    IGNORE_INDEX,
    ConstrainedSFTOutput,
    Cooling,
    CWDPOOutput,
    Divergence,
    GentleNegatives,
    Head,
    MemoryBudget,
    PreferenceOutput,
    SequenceLogprob,
    TokenStats,
    VocabShard,
)

__version__ = "0.1.0"

__all__ = [
    "IGNORE_INDEX",
    "PREFERENCE_LOSSES",
    "CWDPOOutput",
    "ConstrainedSFTOutput",
    "Cooling",
    "CoolingWeighted",
    "Divergence",
    "GentleNegatives",
    "Head",
    "MemoryBudget",
    "PreferenceLoss",
    "PreferenceOutput",
    "SequenceLogprob",
    "TokenStats",
    "TokenTree",
    "VocabShard",
    "backend",
    "backend_details",
    "constrained_sft_loss",
    "cooling_weight",
    "cwdpo_loss",
    "default_workspace_bytes",
    "linear_constrained_sft_loss",
    "linear_cwdpo_loss",
    "linear_logprob",
    "linear_preference_loss",
    "linear_sequence_logprob",
    "logits_cwdpo_loss",
    "logits_logprob",
    "logits_sequence_logprob",
    "missing_backend",
    "preference_loss",
    "sequence_logprob",
    "shift_labels",
    "token_divergence",
    "token_stats",
    "tree_attention",
]
