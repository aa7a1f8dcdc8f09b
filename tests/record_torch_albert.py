"""Records what transformers' `AlbertForMaskedLM` computes for small configurations.

The suite does not run this: it holds our own model against the recording, on the same weights,
which come from a seed. To record again, in an environment with `torch` and `transformers`:

    python tests/record_torch_albert.py > tests/torch_albert.json
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
import transformers
from tiny_albert import GROUPS, TINY, labels, rows, tensors

from albert_task import AlbertConfig


def torch_model(config: AlbertConfig) -> Any:
    """The model on `tensors` of its own names and shapes, in inference mode."""
    own = transformers.AlbertConfig(**config.to_dict(), attn_implementation="eager")
    model = transformers.AlbertForMaskedLM(own).eval()
    weights = tensors(names_and_shapes(model))
    left = model.load_state_dict({k: torch.tensor(v) for k, v in weights.items()}, strict=False)
    assert not left.unexpected_keys
    assert all(name.startswith("predictions.decoder.") for name in left.missing_keys)
    return model


def names_and_shapes(model: Any) -> dict[str, list[int]]:
    """Of all parameters, each once: the decoder's, which are tied to others, are left out."""
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def forward(model: Any, tokens: np.ndarray, types: np.ndarray, goals: np.ndarray) -> Any:
    return model(
        input_ids=torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(tokens != 0, dtype=torch.long),
        token_type_ids=torch.tensor(types, dtype=torch.long),
        labels=torch.tensor(goals, dtype=torch.long),
        output_hidden_states=True,
    )


def recorded(config: AlbertConfig) -> dict[str, Any]:
    model = torch_model(config)
    tokens = rows(2, 8)
    types = np.zeros_like(tokens)
    types[:, 5:] = 1
    goals = labels(tokens)
    found = forward(model, tokens, types, goals)
    found.loss.backward()
    own = dict(model.named_parameters())
    return {
        "config": config.to_dict(),
        "shapes": names_and_shapes(model),
        "batch": {
            "input_ids": tokens.tolist(),
            "token_type_ids": types.tolist(),
            "labels": goals.tolist(),
        },
        "hidden": rounded(found.hidden_states[-1]),
        "logits": rounded(found.logits),
        "loss": found.loss.item(),
        "gradient_norms": {name: rounded(p.grad.norm()) for name, p in own.items()},
    }


def rounded(tensor: Any) -> Any:
    values = np.asarray(tensor.detach(), np.float64)
    return json.loads(json.dumps(values.tolist()), parse_float=lambda x: float(f"{float(x):.6g}"))


if __name__ == "__main__":
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    cases = {"shared": recorded(TINY), "groups": recorded(GROUPS)}
    print(json.dumps({"versions": versions, **cases}))
