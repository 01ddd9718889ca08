"""The train step, the same for every method: one pure function of (state, batch, frozen)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fmzoo import rows


class TrainState(NamedTuple):
  """All that changes while training; saved and restored as a whole."""

  step: jax.Array  # [] int32, finished steps; also the data position
  rng: jax.Array  # [] typed key, the run's base key, never changed
  params: Any  # float32 tree
  ema: Any  # like params; None where a leaf is frozen
  opt_state: Any  # optax state of the trainable leaves
  bad_steps: jax.Array  # [] int32, non-finite steps in a row


def partition(params, trainable):
  """Splits a tree in two of the same structure: (trainable, frozen), None at the other's leaves."""
  chosen = jax.tree.map(lambda leaf, use: leaf if use else None, params, trainable)
  others = jax.tree.map(lambda leaf, use: None if use else leaf, params, trainable)
  return chosen, others


def merge(first, second):
  """Inverts `partition`: leaves of `first`, those of `second` where `first` has None."""
  return jax.tree.map(
    lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None
  )


def ema_params(state):
  """Returns the parameters to sample with: averaged where trained, else as they are."""
  return merge(state.ema, state.params)


def init_state(method, tx, rng, params=None):
  """Returns the state before the first step; `rng` is the run's key, `params` defaults to init."""
  rng_params, rng_steps = jax.random.split(rng)
  params = method.init(rng_params) if params is None else params
  trainable, _ = partition(params, method.trainable(params))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    rng=rng_steps,
    params=params,
    ema=jax.tree.map(jnp.copy, trainable),
    opt_state=tx.init(trainable),
    bad_steps=jnp.zeros((), jnp.int32),
  )


def _accumulated(value_and_grad, params, batch, rng, *, count, together):
  """Means of ((loss, metrics), gradient) over `count` micro-batches, one after the other."""
  if count == 1:
    return value_and_grad(params, batch, rng)
  parts = rows.micro_batches((batch, rng), count, together)
  first = jax.eval_shape(value_and_grad, params, *jax.tree.map(lambda rows: rows[0], parts))
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)

  def add(total, part):
    """Adds the results of one micro-batch."""
    return jax.tree.map(jnp.add, total, value_and_grad(params, *part)), None

  total, _ = jax.lax.scan(add, zeros, parts)
  return jax.tree.map(lambda leaf: leaf / count, total)


def part_norms(grads):
  """Returns {top-level part: L2 norm of its gradient}, without parts that are frozen."""
  return {name: optax.tree.norm(part) for name, part in grads.items() if jax.tree.leaves(part)}


def make(
  method, tx, inputs, *,
  ema_decay, ema_ramp=False, ema_every=1, accumulate_steps=1, axis_name=None,
):
  """Builds the step.

    g = grad loss;  params <- params + tx(g);  ema <- ema + (1 - d)(params - ema)

  A step whose loss or gradient is not finite changes nothing but `step` and `bad_steps`.

  Args:
    method: methods.base.Method.
    tx: optax transformation over the trainable leaves.
    inputs: (frozen, batch, rng [B]) -> batch, what is done on the device before the loss.
    ema_decay: d, per step.
    ema_ramp: d is at most (1 + k) / (10 + k) at step k, so that early averages are useful.
    ema_every: n, the average moves at steps 0, n, 2 n, ... with d^n for d. Written as an increment
      it is the float64 average rounded to float32, to one unit in the last place.
    accumulate_steps: micro-batches per step.
    axis_name: mapped axis inside pmap; None where the batch is the global one.

  Returns:
    train_step(state, batch, frozen) -> (state, metrics): metrics are float32 scalars; `loss`,
    `grad_norm` and `bad_steps` beside the method's, and `grad_norms`, {part: that of its gradient}.
  """

  def train_step(state, batch, frozen):
    """Returns (state after one step, metrics)."""
    rng_inputs, rng_loss = jax.random.split(jax.random.fold_in(state.rng, state.step))
    size = jax.tree.leaves(batch)[0].shape[0]
    first_row = 0 if axis_name is None else jax.lax.axis_index(axis_name) * size
    indices = first_row + rows.order(size, method.period, method.groups)
    batch = inputs(frozen, batch, rows.keys(rng_inputs, indices))
    params, fixed = partition(state.params, method.trainable(state.params))

    def loss_fn(params, batch, rng):
      """The loss as a function of the trained leaves."""
      return method.loss(merge(params, fixed), batch, rng, state.step)

    (loss, metrics), grads = _accumulated(
      jax.value_and_grad(loss_fn, has_aux=True), params, batch,
      rows.keys(rng_loss, indices),
      count=accumulate_steps, together=method.period // method.groups,
    )
    if axis_name is not None:
      loss, metrics, grads = jax.lax.pmean((loss, metrics, grads), axis_name)
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    k = state.step.astype(jnp.float32)
    rate = jnp.float32(1 - ema_decay**ema_every)
    rate = jnp.maximum(rate, 9 / (10 + k)) if ema_ramp else rate
    rate = jnp.where(state.step % ema_every == 0, rate, 0.0)
    ema = jax.tree.map(lambda average, new: average + rate * (new - average), state.ema, params)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    params, ema, opt_state = jax.tree.map(
      lambda new, old: jnp.where(good, new, old),
      (params, ema, opt_state),
      (partition(state.params, method.trainable(state.params))[0], state.ema, state.opt_state),
    )
    bad_steps = jnp.where(good, 0, state.bad_steps + 1)
    state = TrainState(
      state.step + 1, state.rng, merge(params, fixed), ema, opt_state, bad_steps
    )
    metrics |= {'loss': loss, 'grad_norm': grad_norm, 'bad_steps': bad_steps}
    metrics['grad_norms'] = part_norms(grads)  # what `grad_norm` is made of, computed once
    return state, metrics | method.grad_metrics(grads)

  return train_step
