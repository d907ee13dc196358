"""Optimisers, aggregation of several tasks' gradients, training stability."""

from .forecast import Forecast, forecast_attention_logit, forecast_gradient_rms
from .probes import StabilityProbes
from .remedies import independent_weight_decay, mup_groups, warmup_cosine, z_penalty
from .stability import LEARNING_RATES, StabilityReport, Trial, diverged, lr_sensitivity, stability_report

__all__ = [
    "LEARNING_RATES", "Forecast", "StabilityProbes", "StabilityReport", "Trial", "diverged", "forecast_attention_logit",
    "forecast_gradient_rms", "independent_weight_decay", "lr_sensitivity", "mup_groups", "stability_report",
    "warmup_cosine", "z_penalty",
]  # fmt: skip
