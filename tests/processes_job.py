"""A training run of one process or of several, for `test_processes.py`.

    python processes_job.py FOLDER OPTIONS

OPTIONS is JSON: `steps`, `mesh`, `resume`, `apart` (steps that later processes would take
more), `rewinds` (whether the run goes back after step 7), and `strike`: [step, process, what],
which happens to one process after a step. Writes what each process saw to
`FOLDER/process-N.json`.
"""

import json
import os
import signal
import sys
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
from stacked import Sharded
from tasks import rows

from jaxlightning import Callback, DataLoader, Trainer
from jaxlightning.callbacks import ModelCheckpoint
from jaxlightning.loggers import JSONLLogger
from jaxlightning.parallel._processes import index


class Counted:
    """A source that knows which rows were asked for."""

    def __init__(self, data):
        self.data, self.read = data, []

    def __len__(self):
        return len(self.data["x"])

    def __getitem__(self, rows):
        self.read.append(np.asarray(rows).tolist())
        return {name: column[rows] for name, column in self.data.items()}


class Watch(Callback):
    """Remembers losses, and strikes."""

    def __init__(self, strike, rewinds):
        self.strike, self.rewinds, self.losses = strike, rewinds, []

    def on_train_batch_end(self, trainer, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        if self.rewinds and trainer.global_step == 7:
            self.rewinds = False
            trainer.rewind(4, "It was asked for.")
        if self.strike and self.strike[:2] == [trainer.global_step, index()]:
            what = self.strike[2]
            if what == "raise":
                raise RuntimeError("struck on purpose")
            os.kill(os.getpid(), getattr(signal, what))


def main(folder, options):
    folder = Path(folder)
    watch, source = Watch(options.get("strike"), options.get("rewinds")), Counted(rows(96))
    trainer = Trainer(
        max_steps=options.get("steps", 12) + (options.get("apart", 0) if index() else 0),
        strategy="fsdp",
        mesh=options.get("mesh"),
        callbacks=[
            watch,
            ModelCheckpoint(dirpath=folder / "checkpoints", every_n_train_steps=4, save_top_k=-1),
        ],
        logger=JSONLLogger(folder / "logs"),
        default_root_dir=folder,
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trained = None
    try:
        trained = trainer.fit(
            Sharded(),
            DataLoader(source, 16, shuffle=True),
            DataLoader(rows(20), 8),
            resume=options.get("resume"),
        )
    finally:
        seen = {
            "losses": watch.losses,
            "step": trainer.global_step,
            "read": source.read,
            "order": DataLoader(rows(96), 16, shuffle=True).order(0).tolist(),
            "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        }
        if trained is not None:
            leaves = jax.tree.leaves(eqx.filter(trainer.state.task, eqx.is_inexact_array))
            gathered = jax.jit(lambda x: x, out_shardings=trainer._placement.replicated)(leaves)
            seen["parameters"] = [float(np.asarray(x).sum()) for x in gathered]
            predicted = trainer.predict(trained, DataLoader(rows(20), 8))
            seen["predicted"] = np.asarray(predicted).shape
        (folder / f"process-{index()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
