"""Devices: one mesh, and rules that say where each array lives on it."""

from ._mesh import Placement as Placement
from ._mesh import fsdp as fsdp
from ._mesh import leaf_path as leaf_path
from ._mesh import make_mesh as make_mesh
from ._mesh import pick_devices as pick_devices
from ._mesh import spec_axes as spec_axes
from ._mesh import strategy_rules as strategy_rules
