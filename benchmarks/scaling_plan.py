"""Plans ALBERT-xxlarge for 8 to 2,048 H100s: what `docs/scaling.md` carries on to 4,096.

    python -m benchmarks.scaling_plan

Four rows of 512 tokens a device, bf16-mixed, AdamW; DDP, and FSDP within nodes of 8. Nothing is
executed. One JSON object a line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from albert_task import AlbertConfig, AlbertForMaskedLM
from jaxlightning import Trainer

ROWS, LENGTH, NODE = 4, 512, 8


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", default="8,64,512,2048")
    parser.add_argument("--device", default="h100")
    arguments = parser.parse_args(given)
    config = AlbertConfig.preset("xxlarge")
    for count in map(int, arguments.devices.split(",")):
        for strategy, mesh in (
            ("ddp", {"data": count}),
            ("fsdp", {"data": count // NODE, "fsdp": NODE}),
        ):
            trainer = Trainer(
                strategy=strategy,
                mesh={axis: 1 for axis in mesh},
                devices=1,
                precision="bf16-mixed",
                logger=False,
                enable_checkpointing=False,
            )
            plan = trainer.plan(
                lambda key: AlbertForMaskedLM.init(config, key, optimizer="adamw"),
                {"tokens": jax.ShapeDtypeStruct((ROWS * count, LENGTH), jnp.int32)},
                mesh=mesh,
                device=arguments.device,
            )
            told = {"benchmark": "scaling_plan", "case": strategy} | plan.as_dict()
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
