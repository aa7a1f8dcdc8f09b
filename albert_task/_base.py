"""What all of ALBERT's tasks share: the model, a recipe, and how both are written down."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxlightning import TaskModule
from jaxlightning._nearest import nearest
from jaxlightning.parallel import Rule, leaf_path

from ._config import AlbertConfig
from ._layers import named_key
from ._model import Albert
from ._optimizers import Recipe, computed_beside
from ._rows import Rows, check_numbers

_Task = TypeVar("_Task", bound="AlbertTask")


class AlbertTask(TaskModule):
    """An ALBERT, heads on it, and the recipe they are trained by.

    A subclass adds its heads as fields, makes them in `parts`, and says in `training_step` what
    is learnt. Its own static fields are options of `init`, next to those of `Recipe`.
    """

    independent_examples = True

    albert: Albert
    recipe: Recipe = eqx.field(static=True, kw_only=True, default=Recipe())
    """The optimizer and its numbers."""

    @classmethod
    def parts(cls, config: AlbertConfig, key: PRNGKeyArray) -> dict[str, Any]:
        """The fields that hold arrays, with random weights."""
        raise NotImplementedError(
            f"`{cls.__name__}` has no `parts`. Write a classmethod that returns its modules: "
            '`{"albert": Albert(config, key=key), "head": ...}`.'
        )

    @classmethod
    def init(cls: type[_Task], config: AlbertConfig, key: PRNGKeyArray, **options: Any) -> _Task:
        """With random weights (`_layers.initial`).

        **Arguments:**

        - `options`: those of this class, and the fields of `Recipe`: `optimizer`,
          `learning_rate`, `weight_decay`, `warmup_steps`, `total_steps`, …

        **Raises:** `ValueError` for an unknown option, or a value that cannot be.
        """
        config = computed_beside(options.get("optimizer", Recipe().optimizer), config)
        return cls.of(**cls.parts(config, key), **options)

    @classmethod
    def of(cls: type[_Task], **parts_and_options: Any) -> _Task:
        """As `init`, with the modules that `parts` names given."""
        modules = {
            field.name for field in dataclasses.fields(cls) if not field.metadata.get("static")
        }
        own = {field.name for field in dataclasses.fields(cls)} - modules - {"recipe"}
        known = [*sorted(own), *Recipe._fields]
        for name in sorted(set(parts_and_options) - modules - set(known)):
            raise ValueError(f"`{cls.__name__}` has no option `{name}`.{nearest(name, known)}")
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in parts_and_options.items()
        }
        fields = {k: v for k, v in given.items() if k in modules | own}
        recipe = {k: v for k, v in given.items() if k in Recipe._fields}
        return cls(recipe=Recipe(**recipe), **fields)

    @classmethod
    def from_pretrained(cls: type[_Task], name: str | Path, **how: Any) -> _Task:
        """From a folder or the hub; see [`from_pretrained`][albert_task.from_pretrained], whose
        arguments it has. Heads that the weights lack begin with random weights, from `key`."""
        from ._convert import from_pretrained

        return from_pretrained(name, cls, **how)

    def __check_init__(self) -> None:
        self.recipe.check()
        paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(self)]
        for pattern in self.recipe.frozen:
            if not any(re.search(pattern, path) for path in paths):
                raise ValueError(
                    f"`{pattern}` freezes nothing: no parameter's path has it in it. Paths "
                    f"are such as {', '.join(f'`{path}`' for path in paths[:4])}."
                )

    @property
    def config(self) -> AlbertConfig:
        return self.albert.config

    def hidden(
        self, rows: Rows, key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch seq hidden"]:
        """The last layer's vectors."""
        return self.albert(
            rows.tokens,
            mask=rows.seen,
            token_types=rows.token_types,
            positions=rows.positions,
            key=named_key(key, "dropout") if key is not None else None,
        )

    def limits(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Below which number the integers of a batch have to lie, by their name."""
        config = self.config
        return {
            "tokens": config.vocab_size,
            "input_ids": config.vocab_size,
            "token_type_ids": config.type_vocab_size,
            "position_ids": config.max_position_embeddings,
        }

    def check_batch(self, batch: PyTree) -> None:
        """**Raises:** `ValueError` for ids and labels that the model does not have."""
        if isinstance(batch, Mapping):  # if not, the step says so
            check_numbers(batch, self.limits(batch))

    def configure_optimizers(self) -> optax.GradientTransformation:
        return self.recipe.build(self.config.num_hidden_groups)

    def trainable(self) -> PyTree[bool]:
        """All parameters but those that the recipe freezes."""
        allowed = super().trainable()
        return jax.tree_util.tree_map_with_path(
            lambda path, ok: ok and not self.recipe.freezes(leaf_path(path)), allowed
        )

    def partition_rules(self) -> Sequence[Rule]:
        return self.albert.partition_rules()

    def hyperparameters(self) -> dict[str, Any]:
        own = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata.get("static") and field.name != "recipe"
        }
        tuples = {k: v._asdict() for k, v in own.items() if hasattr(v, "_asdict")}
        return dataclasses.asdict(self.config) | self.recipe._asdict() | own | tuples

    @classmethod
    def from_hyperparameters(
        cls: type[_Task], hyperparameters: Mapping[str, Any], key: PRNGKeyArray
    ) -> _Task:
        of_config = {field.name for field in dataclasses.fields(AlbertConfig)}
        config = AlbertConfig(**{k: v for k, v in hyperparameters.items() if k in of_config})
        options = {k: v for k, v in hyperparameters.items() if k not in of_config}
        return cls.init(config, key, **cls._read(options))

    @classmethod
    def _read(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Options as JSON has them, with what it cannot hold restored."""
        return options


def example_weights(
    batch: dict[str, Any], like: Int[Array, " batch"] | Float[Array, " batch"]
) -> Float[Array, " batch"]:
    """`example_weight` of the batch, 0 for rows that only fill it up; by default 1 each."""
    given = batch.get("example_weight")
    return jnp.ones(len(like)) if given is None else given.astype(jnp.float32)
