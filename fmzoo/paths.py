"""Which paths may be addresses, gs://bucket/name: stored latents that are read, and no others.

Files of this machine, which include those of any mounted file system, may lie anywhere.
"""

BUCKET = 'gs://'  # of Google Cloud Storage
MOUNT = 'mount the bucket, with Cloud Storage FUSE for gs://, and give the path of the mount'


def is_bucket(path):
  """Says whether a path is the address of something in Google Cloud Storage."""
  return str(path).startswith(BUCKET)


def expect_local(name, path, remedy=MOUNT):
  """Refuses an address, which would quietly become a folder of that name here.

  Args:
    name: key or flag, for the message.
    path: what it was set to.
    remedy: what to do in place of it.

  Raises:
    ValueError: if the path holds '://'.
  """
  if '://' in str(path):
    raise ValueError(f'{name}={path} is an address, expected a path of this machine; {remedy}')
