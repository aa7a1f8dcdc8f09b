"""Trains a step on 8 devices, and plans the same one: prints what both need, as JSON.

JAX_NUM_CPU_DEVICES=8 python plan_job.py
"""

import json

import jax
from devices_job import albert, texts
from tasks import quiet

from jaxlightning import DataLoader
from jaxlightning._plan import peak_bytes


def main():
    data = {k: v[:32] for k, v in texts().items()}
    for mesh in ({"data": 2, "fsdp": 2, "tensor": 2},):
        trainer = quiet(max_steps=1, devices="auto", mesh=mesh, strategy="fsdp")
        trainer.fit(albert(), DataLoader(data, 32))
        (program,) = trainer._run.program._compiled.values()
        held = {
            name: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
            for name, tree in (
                ("parameters", jax.tree.map(_array, trainer.state.task)),
                ("optimizer", trainer.state.opt_state),
            )
        }
        held |= {
            "temporaries": program.memory_analysis().temp_size_in_bytes,
            "peak": peak_bytes(program),
        }
        planned = quiet(devices=1, strategy="fsdp", mesh={"fsdp": 1}).plan(
            albert(), data, mesh=mesh
        )
        print(json.dumps([held, {name: getattr(planned, name) for name in held}]), flush=True)


def _array(leaf):
    return leaf if isinstance(leaf, jax.Array) else None


if __name__ == "__main__":
    main()
