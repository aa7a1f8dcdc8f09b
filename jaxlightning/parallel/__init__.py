"""Devices: one mesh, and rules that say where each array lives on it."""

from ._context import axis_size as axis_size
from ._context import constrain as constrain
from ._context import gather_layer as gather_layer
from ._mesh import Placement as Placement
from ._mesh import leaf_path as leaf_path
from ._mesh import make_mesh as make_mesh
from ._mesh import pick_devices as pick_devices
from ._mesh import placed as placed
from ._processes import initialise as initialise
from ._rules import DATA_AXES as DATA_AXES
from ._rules import Rule as Rule
from ._rules import fsdp as fsdp
from ._rules import spec_axes as spec_axes
from ._rules import strategy_rules as strategy_rules
