"""The pack's nodes: thin, one file per family, no maths. Each file ends in its list."""

from .concept import NODES as concept_nodes
from .concept_map import NODES as concept_map_nodes
from .cre import NODES as cre_nodes
from .demo import NODES as demo_nodes
from .eiup import NODES as eiup_nodes
from .preset import NODES as preset_nodes

NODES = [*concept_nodes, *cre_nodes, *eiup_nodes, *concept_map_nodes, *preset_nodes, *demo_nodes]
