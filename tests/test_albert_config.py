"""What an ALBERT is made of: presets, sizes, Hugging Face's files, and what is refused."""

import dataclasses
import json
import math

import equinox as eqx
import jax
import pytest

from albert_task import Albert, AlbertConfig

PARAMETERS = {"base": 11_683_584, "large": 17_683_968, "xlarge": 58_724_864, "xxlarge": 222_595_584}


def parameters(config, **options):
    """How many numbers the model is made of. Nothing is allocated."""
    shapes = eqx.filter_eval_shape(lambda: Albert(config, key=jax.random.key(0), **options))
    leaves = jax.tree.leaves(eqx.filter(shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct)))
    return sum(math.prod(leaf.shape) for leaf in leaves)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", PARAMETERS)
def test_released_sizes_are_exact(name, version):
    assert parameters(AlbertConfig.preset(name, version)) == PARAMETERS[name]


def test_without_its_pooler_a_model_is_smaller_by_one_dense_layer():
    config = AlbertConfig.preset("base")
    assert parameters(config, pooler=False) == PARAMETERS["base"] - (768 * 768 + 768)


def test_weights_are_shared_but_for_groups_and_inner_groups():
    config = AlbertConfig.preset("base")
    layer = parameters(dataclasses.replace(config, inner_group_num=2)) - PARAMETERS["base"]
    assert parameters(dataclasses.replace(config, num_hidden_layers=24)) == PARAMETERS["base"]
    grouped = dataclasses.replace(config, num_hidden_groups=3, inner_group_num=2)
    assert parameters(grouped) == PARAMETERS["base"] + 5 * layer


@pytest.mark.parametrize(
    ("name", "version", "dropout"),
    [
        ("base", 1, 0.1),
        ("large", 1, 0.1),
        ("xlarge", 1, 0.1),
        ("xxlarge", 1, 0.0),
        ("base", 2, 0.0),
        ("xxlarge", 2, 0.0),
    ],
)
def test_versions_differ_in_dropout(name, version, dropout):
    config = AlbertConfig.preset(name, version)
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == dropout
    other = AlbertConfig.preset(name, 3 - version)
    same = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    assert dataclasses.replace(other, **same) == config


def test_the_default_is_the_released_xxlarge():
    assert AlbertConfig() == AlbertConfig.preset("xxlarge")


def test_changes_of_a_preset():
    config = AlbertConfig.preset("small", vocab_size=99, hidden_dropout_prob=0.2)
    assert (config.vocab_size, config.hidden_dropout_prob, config.hidden_size) == (99, 0.2, 128)
    with pytest.raises(ValueError, match=r"has no field `vocab`. Did you mean `vocab_size`"):
        AlbertConfig.preset("small", vocab=99)


@pytest.mark.parametrize(
    ("layers", "groups", "used"),
    [
        (12, 1, [0] * 12),
        (12, 3, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]),
        (5, 3, [0, 0, 1, 1, 2]),
        (3, 3, [0, 1, 2]),
    ],
)
def test_which_group_a_layer_uses(layers, groups, used):
    config = AlbertConfig.preset("tiny", num_hidden_layers=layers, num_hidden_groups=groups)
    assert list(config.layer_groups) == used


# What transformers writes besides the architecture, the names likest to a field of it included.
FURTHER = {
    "architectures": ["AlbertForMaskedLM"],
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "torchscript": False,
    "tie_word_embeddings": True,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "cross_attention_hidden_size": None,
    "finetuning_task": None,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "pruned_heads": {},
    "sep_token_id": None,
    "decoder_start_token_id": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "num_beam_groups": 1,
    "task_specific_params": None,
    "problem_type": None,
    "tokenizer_class": None,
    "_name_or_path": "",
    "transformers_version": "4.57.6",
    "down_scale_factor": 1,
    "gap_size": 0,
    "layers_to_keep": [],
    "net_structure_type": 0,
    "num_memory_blocks": 0,
    "torch_dtype": "float32",
}


def test_a_file_of_hugging_face(tmp_path):
    config = AlbertConfig.preset("base", vocab_size=178, hidden_act="gelu")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(FURTHER | config.to_dict()))
    assert AlbertConfig.from_json(path) == dataclasses.replace(config, labels=("LABEL_0",))


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ({"id2label": {"1": "good", "0": "bad"}}, ("bad", "good")),
        ({"num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"architectures": ["AlbertForSequenceClassification"]}, ("LABEL_0", "LABEL_1")),
        ({"architectures": ["TFAlbertForTokenClassification"]}, ("LABEL_0", "LABEL_1")),
        ({"architectures": ["AlbertForMaskedLM"], "pad_token_id": None}, ()),
        ({}, ()),
    ],
)
def test_labels_of_hugging_face(values, labels):
    config = AlbertConfig.from_dict({"model_type": "albert", **values})
    assert config.labels == labels
    assert AlbertConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "ids have to be 0, 1, 2, … without a gap"),
        ({"id2label": ["a"]}, "has to map ids to names"),
        ({"id2label": {"0": "a", "1": "a"}}, "has a name twice"),
        ({"problem_type": "ranking"}, "`problem_type='ranking'` is unknown"),
    ],
)
def test_labels_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        AlbertConfig.from_dict({"model_type": "albert", **values})


def test_a_configuration_survives_json():
    config = AlbertConfig.preset("large", 1, num_hidden_groups=3, layer_norm_eps=1e-6)
    assert AlbertConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "bert"}, "`model_type='bert'`: this is the configuration of another model"),
        ({"model_type": "albert", "net_structure_type": 1}, "`net_structure_type=1` is not"),
        ({"model_type": "albert", "hidden_sizes": 8}, "no field `hidden_sizes`. Did you mean"),
        (
            {"layers": 8},
            "no field `layers`.*The fields are attention, attention_probs",
        ),
    ],
)
def test_what_is_no_configuration(values, message):
    with pytest.raises(ValueError, match=message):
        AlbertConfig.from_dict(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds a JSON list, but a configuration is an object"),
        ('{"hidden_size": 0}', r"config\.json`: `hidden_size=0` has to be an integer of at least"),
    ],
)
def test_what_is_no_file(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        AlbertConfig.from_json(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "`vocab_size=0` has to be an integer of at least 1"),
        ({"num_attention_heads": True}, "`num_attention_heads=True` has to be an integer"),
        (
            {"num_attention_heads": 5},
            "`hidden_size=32` is not divisible by `num_attention_heads=5`",
        ),
        ({"num_hidden_groups": 3}, "`num_hidden_groups=3` is more than `num_hidden_layers=2`"),
        (
            {"hidden_dropout_prob": 1.0},
            "`hidden_dropout_prob=1.0` has to be at least 0 and below 1",
        ),
        ({"layer_norm_eps": 0.0}, "`layer_norm_eps=0.0` has to be above 0"),
        ({"initializer_range": -0.1}, "`initializer_range=-0.1` has to be above 0"),
        ({"hidden_act": "gelu_old"}, "`hidden_act='gelu_old'` is unknown; it is one of 'gelu_new'"),
        ({"hidden_act": "gelu_old"}, "Did you mean `gelu"),
        ({"position_embedding_type": "relative_key"}, "every released ALBERT has `'absolute'`"),
        ({"pad_token_id": 512}, "`pad_token_id=512` is no id of a vocabulary of `vocab_size=512`"),
    ],
)
def test_what_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        AlbertConfig.preset("tiny", **changes)


def test_unknown_presets():
    with pytest.raises(
        ValueError, match=r"no ALBERT preset 'bas'; .*'xxlarge'. Did you mean `base`"
    ):
        AlbertConfig.preset("bas")
    with pytest.raises(ValueError, match=r"`version=3` is unknown; ALBERT has versions 1 and 2"):
        AlbertConfig.preset("base", 3)
