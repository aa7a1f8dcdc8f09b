"""Side by side with transformers' torch ALBERT, on the same random weights, in float32.

Needs `torch` and `transformers`, of any version since 4.57; `test_albert_convert.py` holds our
model against recorded numbers without them.
"""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_albert import GROUPS, TINY, labels, rows

from albert_task import (
    Albert,
    AlbertConfig,
    AlbertForMaskedLM,
    from_pretrained,
    from_tensors,
    save_pretrained,
    to_tensors,
)

torch = pytest.importorskip("torch", reason="PyTorch is not installed (the extra `peers`)")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (the extra `peers`)"
)
# What these libraries warn of when they are used is their own business.
pytestmark = pytest.mark.filterwarnings("default")

WIDE = AlbertConfig.preset("base", num_hidden_groups=4, inner_group_num=3, num_hidden_layers=12)
CONFIGS = {
    "base": AlbertConfig.preset("base"),
    "wide_groups": dataclasses.replace(WIDE, hidden_size=192, intermediate_size=512),
    "groups": GROUPS,
    "erf_gelu": dataclasses.replace(TINY, hidden_act="gelu"),
}


def theirs(kind, config, attention="sdpa"):
    """Their model with its own initial weights, and biases and norms moved off theirs."""
    torch.manual_seed(0)
    own = transformers.AlbertConfig(**config.to_dict(), attn_implementation=attention)
    model = getattr(transformers, kind)(own).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "position" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def state(model):
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def batch(config, seq=24):
    tokens = rows(3, min(seq, config.max_position_embeddings), config.vocab_size)
    types = np.zeros_like(tokens)
    types[:, 9:] = 1
    return {
        "input_ids": tokens,
        "attention_mask": (tokens != 0).astype(np.int32),
        "token_type_ids": types,
    }


def run(model, inputs, **options):
    return model(**{k: torch.tensor(v, dtype=torch.long) for k, v in inputs.items()}, **options)


def difference(ours, other):
    return np.abs(np.asarray(ours, np.float64) - other.detach().numpy()).max()


def every_hidden(albert, tokens, mask, types):
    """What each layer gives out, by the parts that `Albert.__call__` is made of."""
    x = albert.mapping(albert.embeddings(tokens, types, None, None))
    yield x
    for group in albert.config.layer_groups:
        for layer in albert.groups[group]:
            x = layer(x, mask[:, None, :], None)
            yield x


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("base", "eager"),
        ("base", "sdpa"),
        ("wide_groups", "sdpa"),
        ("groups", "eager"),
        ("erf_gelu", "sdpa"),
    ],
)
def test_hidden_pooled_and_logits(name, attention):
    config = CONFIGS[name]
    inputs = batch(config)
    tokens, types = jnp.asarray(inputs["input_ids"]), jnp.asarray(inputs["token_type_ids"])
    mask = tokens != 0

    other = theirs("AlbertModel", config, attention)
    albert = from_tensors(state(other), Albert(config, key=jax.random.key(0)))
    found = run(other, inputs, output_hidden_states=True)
    hidden = albert(tokens, mask=mask, token_types=types)
    measured = {
        "last_hidden": difference(hidden, found.last_hidden_state),
        "pooled": difference(albert.pooled(hidden), found.pooler_output),
    }
    if name != "base":
        ours = list(every_hidden(albert, tokens, mask, types))
        if len(found.hidden_states) < len(ours):  # transformers 4 leaves out the inner ones
            ours = ours[:: config.inner_group_num]
        pairs = zip(ours, found.hidden_states, strict=True)
        measured["every_hidden"] = max(difference(*pair) for pair in pairs)

    other = theirs("AlbertForMaskedLM", config, attention)
    task = from_tensors(state(other), AlbertForMaskedLM.init(config, jax.random.key(0)))
    logits = eqx.filter_jit(lambda t, b: t.logits(b))(task, jax.tree.map(jnp.asarray, inputs))
    measured["logits"] = difference(logits, run(other, inputs).logits)
    print(name, attention, {what: f"{value:.1e}" for what, value in measured.items()})
    assert max(measured.values()) <= 1e-4, measured


@pytest.mark.parametrize("name", ["base", "groups"])
def test_the_gradient_of_the_masked_loss(name):
    config = CONFIGS[name]
    other = theirs("AlbertForMaskedLM", config)
    task = from_tensors(state(other), AlbertForMaskedLM.init(config, jax.random.key(0)))
    inputs = batch(config) | {"labels": labels(batch(config)["input_ids"])}
    found = run(other, inputs)
    found.loss.backward()

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def ours(task, batch):
        return task.training_step(batch, key=jax.random.key(0))[0].compute()

    loss, grads = ours(task, jax.tree.map(jnp.asarray, inputs))
    assert abs(float(loss) - found.loss.item()) <= 1e-5
    gradients = to_tensors(grads)
    own = dict(other.named_parameters())
    assert set(gradients) == set(own)
    measured = {n: difference(g, own[n].grad) for n, g in gradients.items()}
    largest = max(float(p.grad.abs().max()) for p in own.values())
    worst = max(measured, key=measured.get)
    print(name, f"gradients: {measured[worst]:.1e} of at most {largest:.1e}, in {worst}")
    assert measured[worst] <= 1e-5 * max(1.0, largest)


def test_what_we_save_transformers_loads(tmp_path):
    task = AlbertForMaskedLM.init(GROUPS, jax.random.key(3))
    save_pretrained(task, tmp_path)
    other, report = transformers.AlbertForMaskedLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["unexpected_keys"]
    assert not [n for n in report["missing_keys"] if not n.startswith("predictions.decoder.")]
    inputs = batch(GROUPS)
    ours = task.logits(jax.tree.map(jnp.asarray, inputs))
    assert difference(ours, run(other.eval(), inputs).logits) <= 1e-5


def test_what_transformers_saves_we_load(tmp_path):
    other = theirs("AlbertForMaskedLM", GROUPS)
    other.save_pretrained(tmp_path)
    task = from_pretrained(tmp_path)
    assert dataclasses.replace(task.config, labels=()) == GROUPS
    inputs = batch(GROUPS)
    ours = task.logits(jax.tree.map(jnp.asarray, inputs))
    assert difference(ours, run(other, inputs).logits) <= 1e-5


def test_a_pretraining_checkpoint_has_more_than_we_need(tmp_path):
    other = theirs("AlbertForPreTraining", GROUPS)
    other.save_pretrained(tmp_path)
    inputs = batch(GROUPS)
    ours = from_pretrained(tmp_path).logits(jax.tree.map(jnp.asarray, inputs))
    assert difference(ours, run(other, inputs).prediction_logits) <= 1e-5


def test_tensors_of_torch_itself_are_copied():
    other = theirs("AlbertForMaskedLM", TINY)
    before = AlbertForMaskedLM.init(TINY, jax.random.key(0))
    task = from_tensors(other.state_dict(), before)
    kept = to_tensors(task)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    for name, array in to_tensors(task).items():
        np.testing.assert_array_equal(array, kept[name])


def test_their_configuration_is_ours(tmp_path):
    transformers.AlbertConfig().save_pretrained(tmp_path)
    assert AlbertConfig.from_json(tmp_path / "config.json") == AlbertConfig()
    whole = json.loads(json.dumps(transformers.AlbertConfig().to_dict()))
    names = tuple(f"LABEL_{i}" for i in range(len(whole["id2label"])))
    assert AlbertConfig.from_dict(whole) == AlbertConfig(labels=names)
