"""Accelerators in numbers, from their vendors' data sheets."""

from __future__ import annotations

import re
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from ._nearest import nearest

GB = 1e9
"""As vendors count; devices of `n` GB of memory have `n` GiB where noted."""


class Hardware(NamedTuple):
    """One device: what it can do at most, and how it is connected."""

    kind: str
    """A regular expression for JAX's `device_kind`."""
    half: float
    """Dense FLOPs a second in half precision (bfloat16 or float16)."""
    single: float
    """The same in float32 at JAX's default precision: bfloat16 passes on TPUs, TF32 on GPUs that
    have it."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second to and from that memory."""
    link: float
    """Bytes a second that a device sends to its neighbours in a node (NVLink, PCIe), or in a slice
    (ICI), in one direction: half of what vendors add up."""
    network: float
    """The same between nodes: one 400 Gb/s port a GPU for H100 and later, 200 before; for a TPU,
    which has none within a slice, its `link`."""
    node: int
    """Devices that `link` connects."""

    def peak(self, dtype: DTypeLike) -> float:
        """FLOPs a second in this dtype."""
        return self.half if jnp.dtype(dtype).itemsize <= 2 else self.single


HARDWARE = {
    "tpu-v2": Hardware(r"TPU v2", 22.5e12, 22.5e12, 8 * 2**30, 350 * GB, 62 * GB, 62 * GB, 512),
    "tpu-v3": Hardware(r"TPU v3", 61.5e12, 61.5e12, 16 * 2**30, 450 * GB, 82 * GB, 82 * GB, 2048),
    "tpu-v4": Hardware(r"TPU v4", 275e12, 275e12, 32 * 2**30, 1228 * GB, 150 * GB, 150 * GB, 4096),
    "tpu-v5e": Hardware(
        r"TPU v5( lite|e)", 197e12, 197e12, 16 * 2**30, 819 * GB, 100 * GB, 100 * GB, 256
    ),
    "tpu-v5p": Hardware(
        r"TPU v5p?", 459e12, 459e12, 95 * 2**30, 2765 * GB, 300 * GB, 300 * GB, 8960
    ),
    "tpu-v6e": Hardware(
        r"TPU v6( lite|e)", 918e12, 918e12, 32 * 2**30, 1640 * GB, 224 * GB, 224 * GB, 256
    ),
    "v100": Hardware(r".*V100.*", 125e12, 15.7e12, 32 * 2**30, 900 * GB, 150 * GB, 12.5 * GB, 8),
    "t4": Hardware(r".*\bT4", 65e12, 8.1e12, 16 * 2**30, 320 * GB, 16 * GB, 12.5 * GB, 4),
    "a10": Hardware(r".*\bA10", 125e12, 62.5e12, 24 * 2**30, 600 * GB, 32 * GB, 12.5 * GB, 4),
    "l4": Hardware(r".*\bL4", 121e12, 60.5e12, 24 * 2**30, 300 * GB, 32 * GB, 12.5 * GB, 8),
    "l40s": Hardware(r".*\bL40S", 362e12, 181e12, 48 * 2**30, 864 * GB, 32 * GB, 25 * GB, 8),
    "a100-40g": Hardware(
        r".*A100.*40GB", 312e12, 156e12, 40 * 2**30, 1555 * GB, 300 * GB, 25 * GB, 8
    ),
    "a100-80g": Hardware(r".*A100.*", 312e12, 156e12, 80 * 2**30, 2039 * GB, 300 * GB, 25 * GB, 8),
    "h100-pcie": Hardware(
        r".*H100 PCIe.*", 756e12, 378e12, 80 * 2**30, 2000 * GB, 64 * GB, 50 * GB, 8
    ),
    "h100": Hardware(
        r".*H100.*HBM3", 989e12, 494.5e12, 80 * 2**30, 3350 * GB, 450 * GB, 50 * GB, 8
    ),
    "h200": Hardware(r".*H200.*", 989e12, 494.5e12, 141 * GB, 4800 * GB, 450 * GB, 50 * GB, 8),
    "b200": Hardware(r".*\bB200.*", 2250e12, 1125e12, 180 * GB, 8000 * GB, 900 * GB, 50 * GB, 8),
}
"""By the name that `Trainer.plan` takes."""


def hardware(name: str) -> Hardware:
    """The device of that name.

    **Raises:** `ValueError` for a name that is unknown.
    """
    found = HARDWARE.get(name.lower())
    if found is None:
        raise ValueError(
            f"`device={name!r}` is unknown.{nearest(name.lower(), HARDWARE)} There are "
            f"{', '.join(f'`{known}`' for known in HARDWARE)}; or pass a `Hardware(...)`."
        )
    return found


def device_peak(kind: str, dtype: DTypeLike) -> float | None:
    """The published peak of a device of this `device_kind` in FLOPs a second; `None` if we know
    none, in which case `matmul_peak` measures one."""
    for found in HARDWARE.values():
        if re.fullmatch(found.kind, kind):
            return found.peak(dtype)
    return None
