"""Shape checks, and the letters that name dimensions everywhere in fmzoo.

  B images            H W C latent height, width, channels (channels last)
  P patch size        N tokens = (H / P) (W / P)     D width
  A heads             E = D / A head width           L layers
  S segments          F feature width of a frozen encoder
  T sampling steps    K training steps
"""


def expect_shape(name, array, *shape):
  """Checks a shape while tracing; costs nothing at run time.

  Args:
    name: what the array is called in the message.
    array: anything with a `shape`.
    *shape: expected sizes; None stands for any size.

  Raises:
    ValueError: if the rank or a size differs.
  """
  fits = len(array.shape) == len(shape) and all(
    want is None or have == want for have, want in zip(array.shape, shape)
  )
  if not fits:
    wanted = ', '.join('any' if size is None else str(size) for size in shape)
    raise ValueError(f'{name} has shape {tuple(array.shape)}, expected ({wanted})')
