"""What somebody might plant where files are read: code in pickles, in every form that some reader
of arrays, weights or text falls for. It would leave a file."""

import gzip
import io
import os
import pickle
import zipfile

import numpy as np


class Payload:
    """Code that leaves the file `mark` if anything unpickles it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)

    @property
    def ran(self):
        return self.mark.exists()

    def forms(self):
        """Bytes by name."""
        found = {f"pickle {n}": pickle.dumps(self, n) for n in range(pickle.HIGHEST_PROTOCOL + 1)}
        objects = np.empty(1, object)
        objects[0] = self
        npy, npz, torch = io.BytesIO(), io.BytesIO(), io.BytesIO()
        np.save(npy, objects, allow_pickle=True)
        np.savez(npz, x=objects)
        with zipfile.ZipFile(torch, "w") as archive:
            archive.writestr("archive/data.pkl", found["pickle 2"])
            archive.writestr("archive/version", "3\n")
        files = {"npy": npy.getvalue(), "npz": npz.getvalue(), "torch": torch.getvalue()}
        return found | files | {"gzip": gzip.compress(found["pickle 4"])}

    def mixed(self):
        """One of each kind: for readers that cost more to try."""
        forms = self.forms()
        return {name: forms[name] for name in ("pickle 0", "pickle 5", "npy", "torch")}


NESTED = {
    "lists": "[" * 100_000 + "]" * 100_000,
    "objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
}
"""JSON that a reader which calls itself falls over."""
