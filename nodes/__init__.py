"""The pack's nodes: thin, one file per family, no maths. Each file ends in its list."""

from . import policy as _policy  # noqa: F401  puts an operator's policy on this server, if there is one
from .account import NODES as account_nodes
from .adavd import NODES as adavd_nodes
from .bounds import guarded
from .causal_period import NODES as causal_period_nodes
from .classifier import NODES as classifier_nodes
from .concept import NODES as concept_nodes
from .concept_map import NODES as concept_map_nodes
from .cre import NODES as cre_nodes
from .demo import NODES as demo_nodes
from .direction import NODES as direction_nodes
from .discriminator import NODES as discriminator_nodes
from .edit_weights import NODES as edit_weights_nodes
from .eiup import NODES as eiup_nodes
from .gates import NODES as gate_nodes
from .kpop import NODES as kpop_nodes
from .learn_concept import NODES as learn_concept_nodes
from .preset import NODES as preset_nodes
from .protore import NODES as protore_nodes
from .report import NODES as report_nodes
from .safe_guidance import NODES as safe_guidance_nodes
from .safree import NODES as safree_nodes
from .train_direction import NODES as train_direction_nodes
from .train_erasure import NODES as train_erasure_nodes
from .train_kpop import NODES as train_kpop_nodes

NODES = [
    guarded(node)
    for node in (
        *concept_nodes,
        *cre_nodes,
        *eiup_nodes,
        *edit_weights_nodes,
        *adavd_nodes,
        *protore_nodes,
        *safe_guidance_nodes,
        *safree_nodes,
        *direction_nodes,
        *train_direction_nodes,
        *train_erasure_nodes,
        *train_kpop_nodes,
        *kpop_nodes,
        *learn_concept_nodes,
        *discriminator_nodes,
        *classifier_nodes,
        *gate_nodes,
        *causal_period_nodes,
        *concept_map_nodes,
        *account_nodes,
        *report_nodes,
        *preset_nodes,
        *demo_nodes,
    )
]
