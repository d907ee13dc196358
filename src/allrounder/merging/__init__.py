"""From several checkpoints to one, or to one that serves them all.

Rules that need no data (`average`, `task_arithmetic`, `ties`, `dare`, `breadcrumbs`, `slerp`, `consensus`) or
statistics of the experts (`fisher`, `regmean`) return a `Merge`: weights that are computed when read, and
streamed by `allrounder.save`. Methods that learn coefficients (`adamerging`, `atlas`, `self_positioning`) end as
the same linear rule. `tall_masks.compress` keeps every task in an archive; `TwinMerging` and `LogitFusion` choose
at inference.
"""

from . import logit_fusion, tall_masks
from .adamerging import adamerging
from .atlas import atlas, atlas_negation, atlas_test_time
from .baselines import analogy, average, breadcrumbs, dare, greedy_soup, negate, task_arithmetic, ties
from .coefficients import MergedModel
from .engine import Aligned, Block, Linear, Merge, Rule
from .fisher import fisher, fisher_information
from .logit_fusion import LogitFusion
from .regmean import gram_matrices, regmean
from .self_positioning import info_nce, self_positioning, slerp
from .tall_masks import consensus
from .twin_merging import TwinMerging

__all__ = [
    "Aligned", "Block", "Linear", "LogitFusion", "Merge", "MergedModel", "Rule", "TwinMerging", "adamerging", "analogy",
    "atlas", "atlas_negation", "atlas_test_time", "average", "breadcrumbs", "consensus", "dare", "fisher",
    "fisher_information", "gram_matrices", "greedy_soup", "info_nce", "logit_fusion", "negate", "regmean",
    "self_positioning", "slerp", "tall_masks", "task_arithmetic", "ties",
]  # fmt: skip
