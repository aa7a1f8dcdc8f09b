"""Names of google-research/albert's TensorFlow checkpoints, and Hugging Face's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

_TABLE = [
    (r"^bert/embeddings/LayerNorm", "albert.embeddings.LayerNorm"),
    (
        r"^bert/embeddings/(word|position|token_type)_embeddings$",
        r"albert.embeddings.\1_embeddings.weight",
    ),
    (r"^bert/encoder/embedding_hidden_mapping_in", "albert.encoder.embedding_hidden_mapping_in"),
    (
        r"^bert/encoder/transformer/group_(\d+)/inner_group_(\d+)/",
        r"albert.encoder.albert_layer_groups.\1.albert_layers.\2.",
    ),
    (r"\.attention_1/self/(query|key|value)", r".attention.\1"),
    (r"\.attention_1/output/dense", ".attention.dense"),
    (r"(albert_layers\.\d+)\.LayerNorm_1(?=/)", r"\1.full_layer_layer_norm"),
    (r"(albert_layers\.\d+)\.LayerNorm(?=/)", r"\1.attention.LayerNorm"),
    (r"\.ffn_1/intermediate/output/dense", ".ffn_output"),
    (r"\.ffn_1/intermediate/dense", ".ffn"),
    (r"^bert/pooler/dense", "albert.pooler"),
    (r"^cls/predictions/transform/dense", "predictions.dense"),
    (r"^cls/predictions/transform/LayerNorm", "predictions.LayerNorm"),
    (r"^cls/predictions/output_bias$", "predictions.bias"),
    (r"^cls/seq_relationship/output_weights$", "sop_classifier.classifier.weight"),
    (r"^cls/seq_relationship/output_bias$", "sop_classifier.classifier.bias"),
    (r"^cls/squad/output_weights$", "qa_outputs.weight"),
    (r"^cls/squad/output_bias$", "qa_outputs.bias"),
    (r"^output_weights$", "classifier.weight"),
    (r"^output_bias$", "classifier.bias"),
    (r"/(kernel|gamma)$", ".weight"),
    (r"/(bias|beta)$", ".bias"),
]
"""All that match apply, in order."""

_OPTIMIZER = re.compile(r"/(adam|lamb)_[mv](_\d+)?$|^global_step$|/(Adam|LAMB)")


def from_tf_names(variables: Mapping[str, Any]) -> dict[str, Shaped[np.ndarray, ...]]:
    """The variables of a TensorFlow checkpoint as `from_tensors` takes them.

        reader = tf.train.load_checkpoint("albert_base/model.ckpt-best")
        variables = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
        task = from_tensors(from_tf_names(variables), like)

    `docs/albert_weights.md` has the names as a table. What an optimizer left is passed over.

    **Raises:** `ValueError` with the names that are none of an ALBERT.
    """
    found = {}
    foreign = []
    for original, value in variables.items():
        name = original.removeprefix("module/").removesuffix(":0")
        if _OPTIMIZER.search(name):
            continue
        array = np.asarray(value)
        # Kernels are (in, out) there; matrices called `output_weights` are (out, in), as here.
        if name.endswith("/kernel"):
            array = array.T
        for pattern, new in _TABLE:
            name = re.sub(pattern, new, name)
        if "/" in name or "." not in name:
            foreign.append(f"`{original}`")
        found[name] = array
    if foreign:
        raise ValueError(f"These are no variables of an ALBERT: {', '.join(foreign)}.")
    return found
