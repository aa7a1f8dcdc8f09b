"""A small GAN on eight Gaussians in a ring: a task that owns its update.

Non-saturating losses, with gradient penalties on real and on generated points (Mescheder,
Geiger, Nowozin 2018, "Which training methods for GANs do actually converge?").

    python -m examples.gan
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.nn import softplus
from jaxtyping import Array, Float, PRNGKeyArray

from jaxlightning import DataLoader, Mean, TaskModule, Trainer

Points = Float[Array, "batch 2"]

ANGLES = np.arange(8) * np.pi / 4
CENTRES = (2 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)).astype(np.float32)
SPREAD = 0.1
NOISE = 4


def ring(points: int, seed: int) -> Float[np.ndarray, "points 2"]:
    generator = np.random.default_rng(seed)
    noise = generator.normal(scale=SPREAD, size=(points, 2))
    return (CENTRES[generator.integers(8, size=points)] + noise).astype(np.float32)


class GAN(TaskModule):
    generator: eqx.nn.MLP
    critic: eqx.nn.MLP

    def __init__(self, *, key: PRNGKeyArray, width: int = 64):
        one, two = jax.random.split(key)
        self.generator = eqx.nn.MLP(NOISE, 2, width, depth=2, key=one)
        self.critic = eqx.nn.MLP(2, "scalar", width, depth=2, key=two)

    def sample(self, points: int, key: PRNGKeyArray) -> Points:
        return jax.vmap(self.generator)(jax.random.normal(key, (points, NOISE)))

    def train_step(self, state, batch, *, key):
        generator, critic = state.task.generator, state.task.critic
        optimizers = self.configure_optimizers()
        opt_state = dict(state.opt_state)

        def update(name, module, grads):
            params = eqx.filter(module, eqx.is_inexact_array)
            updates, opt_state[name] = optimizers[name].update(grads, opt_state[name], params)
            return eqx.apply_updates(module, updates)

        fake = state.task.sample(len(batch), key)
        critic_loss, grads = eqx.filter_value_and_grad(critic_objective)(critic, batch, fake)
        critic = update("critic", critic, grads)

        @eqx.filter_value_and_grad
        def generator_objective(generator):
            task = eqx.tree_at(lambda t: t.generator, state.task, generator)
            return softplus(-jax.vmap(critic)(task.sample(len(batch), key))).mean()

        generator_loss, grads = generator_objective(generator)
        generator = update("generator", generator, grads)
        task = eqx.tree_at(lambda t: (t.generator, t.critic), state.task, (generator, critic))
        metrics = {"critic": critic_loss, "generator": generator_loss}
        return state.replace(task=task, opt_state=opt_state), metrics

    def validation_step(self, batch, *, key):
        """The loss is the mean squared distance to the nearest centre."""
        distances = jnp.linalg.norm(self.sample(len(batch), key)[:, None] - CENTRES, axis=-1)
        near = distances < 4 * SPREAD
        found = near.mean(0) > 0.02
        metrics = {"near_a_centre": Mean.over(near.any(1) * 1.0), "modes": found.sum() * 1.0}
        return Mean.over(distances.min(1) ** 2), metrics

    def configure_optimizers(self):
        return {
            "generator": optax.adam(1e-3, b1=0.0, b2=0.9),
            "critic": optax.adam(2e-3, b1=0.0, b2=0.9),
        }


def critic_objective(critic: eqx.nn.MLP, real: Points, fake: Points) -> Float[Array, ""]:
    loss = softplus(-jax.vmap(critic)(real)) + softplus(jax.vmap(critic)(fake))
    steepness = jnp.sum(jax.vmap(jax.grad(critic))(jnp.concatenate([real, fake])) ** 2, axis=-1)
    return loss.mean() + 0.1 * steepness.mean()


def main(max_epochs: int = 60, **options: Any) -> dict[str, float]:
    """`test/modes`: how many of the eight are found; `test/near_a_centre`: the share of points."""
    trainer = Trainer(max_epochs=max_epochs, **options)
    data = DataLoader(ring(8192, seed=0), batch_size=256, shuffle=True)
    task = trainer.fit(lambda key: GAN(key=key), data)
    return trainer.test(task, DataLoader(ring(4096, seed=1), batch_size=4096))


if __name__ == "__main__":
    print(main(default_root_dir="runs/gan"))
