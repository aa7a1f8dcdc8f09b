"""The state of an iterator as JSON values, from which it comes back as it was.

JSON alone turns tuples into lists and keys into strings, and Grain's `ConcatThenSplitIterDataset`
compares with tuples: restored from lists, it goes on in another place, without a word.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np


def encode_state(state: Any) -> Any:
    """**Raises:** `TypeError` for what is no plain value, array, bytes, or container of these."""
    if state is None or type(state) in (bool, int, float, str):
        return state
    if type(state) is list:
        return [encode_state(item) for item in state]
    if type(state) is dict:
        if all(type(name) is str and name[:1] != "~" for name in state):
            return {name: encode_state(value) for name, value in state.items()}
        return {"~dict": [[encode_state(k), encode_state(v)] for k, v in state.items()]}
    if type(state) is tuple:
        return {"~tuple": [encode_state(item) for item in state]}
    if type(state) is bytes:
        return {"~bytes": base64.b64encode(state).decode()}
    if isinstance(state, np.ndarray | np.generic) and not state.dtype.hasobject:
        array = np.asarray(state)
        content = base64.b64encode(array.tobytes()).decode()
        kind = "~array" if isinstance(state, np.ndarray) else "~number"
        return {kind: [array.dtype.str, list(array.shape), content]}
    raise TypeError(
        f"The state of the data's iterator holds a `{type(state).__name__}`, which a checkpoint "
        "can't keep. Let its `get_state` return numbers, strings, arrays, bytes, and lists, tuples "
        "and dicts of these."
    )


def decode_state(encoded: Any) -> Any:
    """The state that `encode_state` was given."""
    if isinstance(encoded, list):
        return [decode_state(item) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    if len(encoded) == 1:
        (kind, content), *_ = encoded.items()
        if kind == "~tuple":
            return tuple(map(decode_state, content))
        if kind == "~dict":
            return {decode_state(k): decode_state(v) for k, v in content}
        if kind == "~bytes":
            return base64.b64decode(content)
        if kind in ("~array", "~number"):
            dtype, shape, data = content
            array = np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()
            return array if kind == "~array" else array[()]
    return {name: decode_state(value) for name, value in encoded.items()}
