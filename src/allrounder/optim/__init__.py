"""Optimisers, aggregation of several tasks' gradients, training stability."""

from .aggregation import RULES, Aggregate, delta_m, make_rule
from .forecast import Forecast, forecast_attention_logit, forecast_gradient_rms
from .frugal import FRUGAL
from .gradient_rules import Rule, cagrad, mgda, nash_mtl
from .information import fisher_information
from .perturb import frozen_batchnorm, perturbed
from .probes import StabilityProbes
from .remedies import independent_weight_decay, mup_groups, warmup_cosine, z_penalty
from .roles import parameter_groups, roles
from .stability import LEARNING_RATES, StabilityReport, Trial, diverged, lr_sensitivity, stability_report

__all__ = [
    "FRUGAL", "LEARNING_RATES", "RULES", "Aggregate", "Forecast", "Rule", "StabilityProbes", "StabilityReport",
    "Trial", "cagrad", "delta_m", "diverged", "fisher_information", "forecast_attention_logit",
    "forecast_gradient_rms", "frozen_batchnorm", "independent_weight_decay", "lr_sensitivity", "make_rule", "mgda",
    "mup_groups", "nash_mtl", "parameter_groups", "perturbed", "roles", "stability_report", "warmup_cosine",
    "z_penalty",
]  # fmt: skip
