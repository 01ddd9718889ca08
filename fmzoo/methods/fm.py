"""Plain flow matching, the baseline SiT: the shortest complete method, read it first.

Source: Lipman et al., arXiv:2210.02747; SiT, arXiv:2401.08740 (linear path, velocity prediction).
"""

import dataclasses

import jax.numpy as jnp

from fmzoo.methods import base, flow, ode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Settings of plain flow matching."""

  path: str  # noising path: 'linear' or 'trig'
  time_mean: float  # t = sigmoid(time_std z + time_mean), z ~ N(0, 1)
  time_std: float  # 0 draws t uniformly in [0, 1)
  label_dropout: float  # probability that a row is trained with the null label


def make(config, net, latent_shape, num_classes):
  """Builds the method.

  Args:
    config: Config.
    net: models.layers.Network; its time-difference input is not used.
    latent_shape: (H, W, C).
    num_classes: labels are 0 .. num_classes - 1; num_classes is the null label.

  Returns:
    base.Method.
  """

  def loss(params, batch, rng, step):
    """Mean over rows and pixels of (v(x_t, t, y) - v_t)^2."""
    del step
    rng_time, rng_noise, rng_drop = flow.split_rows(rng, 3)
    x = batch['latent']
    noise = flow.normal_like(rng_noise, x)
    t = draw_times(config, rng_time)
    labels = jnp.where(
      flow.draw_dropped(rng_drop, config.label_dropout), num_classes, batch['label']
    )
    v = net.apply(params, flow.interpolate(config.path, x, noise, t), t, None, labels)
    return jnp.mean((v - flow.velocity_target(config.path, x, noise, t)) ** 2), {}

  def sample(params, rng, labels, *, num_steps, guidance, solver):
    """Integrates from noise to data; num_steps evaluations (Heun 2 num_steps), twice with guidance.

    Args:
      params: tree.
      rng: keys [B].
      labels: [B] int32.
      num_steps: steps of the uniform grid from t = 1 to t = 0.
      guidance: classifier-free guidance scale; 1 is none.
      solver: 'euler' or 'heun'.

    Returns:
      [B, H, W, C] float32.
    """
    if solver not in ode.INTEGRATORS or num_steps < 1:
      raise ValueError(
        f"sample.solver='{solver}' with sample.num_steps={num_steps}: use one of"
        f' {", ".join(ode.INTEGRATORS)} and at least 1 step'
      )
    x = flow.normal_like(rng, jnp.zeros((labels.shape[0], *latent_shape)))

    def velocity(x, t):
      """Returns the velocity of x at one time, guided: x and result [B, H, W, C]."""
      times = jnp.full(labels.shape, t)
      if guidance == 1:
        return net.apply(params, x, times, None, labels)
      both = jnp.concatenate([labels, jnp.full_like(labels, num_classes)])
      v = net.apply(params, jnp.tile(x, (2, 1, 1, 1)), jnp.tile(times, 2), None, both)
      return flow.guide(*jnp.split(v, 2), guidance)

    return ode.INTEGRATORS[solver](velocity, x, jnp.linspace(1.0, 0.0, num_steps + 1))

  return base.Method(net.init, loss, sample, net.trainable, ('latent', 'label'), period=1)


def draw_times(config, rng):
  """Draws t [B] from keys [B]: logit-normal, or uniform if time_std is 0."""
  if config.time_std == 0:
    return flow.uniform(rng)
  return flow.logit_normal_times(rng, config.time_mean, config.time_std)
