"""Official SoFlow DiT weights (github.com/zlab-princeton/SoFlow) to our tree and back."""

from fmzoo.convert import names

PREFIX = 'network.'


def entries(config, channels):
  """Returns the name map of a DiT.

  Args:
    config: models.dit.Config.
    channels: C, of the latent.
  """
  patch = config.patch

  def conv_to_kernel(weight):
    """[D, C, P, P] -> [P P C, D]."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])

  def kernel_to_conv(kernel):
    """[P P C, D] -> [D, C, P, P]."""
    return kernel.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1)

  found = [
    names.Entry('pos_embed', ('pos_embed',), (), names.same, names.same),
    names.Entry(
      'x_embedder.proj.weight', ('patches', 'kernel'), (), conv_to_kernel, kernel_to_conv
    ),
    names.Entry('x_embedder.proj.bias', ('patches', 'bias'), (), names.same, names.same),
    names.Entry(
      'y_embedder.embedding_table.weight', ('labels', 'table'), (), names.same, names.same
    ),
    *names.linear('final_layer.linear', ('final',)),
    *names.linear('final_layer.adaLN_modulation.1', ('final_modulation',)),
  ]
  for theirs, ours in (('t_embedder', 'time'), ('s_embedder', 'duration')):
    found += names.linear(f'{theirs}.mlp.0', (ours, 'in'))
    found += names.linear(f'{theirs}.mlp.2', (ours, 'out'))
  for i in range(config.depth):
    block = f'blocks.{i}'
    for theirs, ours in (
      ('attn.qkv', ('core', 'attn', 'qkv')), ('attn.proj', ('core', 'attn', 'proj')),
      ('mlp.fc1', ('core', 'mlp', 'fc1')), ('mlp.fc2', ('core', 'mlp', 'fc2')),
      ('adaLN_modulation.1', ('modulation',)),
    ):
      found += names.linear(f'{block}.{theirs}', ('blocks', *ours), (i,))
  return found


def from_official(tensors, config, channels, abstract):
  """Builds our tree; the keys may lack 'network.' and hold '_orig_mod.' or a leading 'module.'.

  Args:
    tensors: {official key: array, or weights.Tensor}.
    config: models.dit.Config.
    channels: C, of the latent.
    abstract: our tree with a shape and dtype at every leaf.

  Returns:
    Tree of numpy arrays, see names.from_official, which also says what is refused.
  """
  return names.from_official(entries(config, channels), names.clean(tensors, PREFIX), abstract)


def to_official(params, config, channels):
  """Returns {official key with 'network.': array} of our tree.

  Args:
    params: tree, or gradients of it.
    config: models.dit.Config.
    channels: C, of the latent.
  """
  tensors = names.to_official(entries(config, channels), params)
  return {PREFIX + key: value for key, value in tensors.items()}
