"""Small objects of Google Cloud Storage by address, read whole; ArrayRecord reads its own."""

import tensorstore

from fmzoo import paths

SECONDS = 60  # until a bucket that does not answer is given up; its client would try for long


def read(address):
  """Returns the bytes of gs://bucket/name, or None where there is no such object.

  Raises:
    ValueError: one line, if the bucket cannot be read.
  """
  bucket, _, name = address.removeprefix(paths.BUCKET).partition('/')
  try:
    objects = tensorstore.KvStore.open({'driver': 'gcs', 'bucket': bucket}).result()
    found = objects.read(name).result(timeout=SECONDS)
  except TimeoutError as error:
    raise ValueError(
      f'{address}: no answer in {SECONDS} s; check the network, or copy the folder to this machine'
    ) from error
  except ValueError as error:
    reason = ' '.join(str(error).split())[:200]
    raise ValueError(
      f'{address} cannot be read ({reason}); check the name of the bucket and the credentials'
      ' (gcloud auth application-default login)'
    ) from error
  return found.value if found.state == 'value' else None
