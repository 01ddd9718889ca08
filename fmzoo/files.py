"""Files that are there complete or not at all."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib

NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)  # of some file systems

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def naming(path):
  """Names a file in errors of the system that leave it out, as those of a write do."""
  try:
    yield
  except OSError as error:
    if error.errno is not None and error.filename is None:
      error.filename = os.fspath(path)
    raise


@contextlib.contextmanager
def replacing(path, sync=False, temporary=None):
  """Opens a temporary file that takes the place of `path` if the block succeeds.

  Args:
    path: its folder is made if missing.
    sync: whether the bytes must be on disk first, lest a lost machine leaves an empty file.
    temporary: path of the temporary file, on the same file system, for those who have a place where
      it is cleaned up after a kill; None is beside `path`, under a name of this process.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = pathlib.Path(temporary or path.with_name(f'{path.name}.{os.getpid()}.tmp'))
  try:
    with naming(path), open(temporary, 'wb') as file:
      yield file
      if sync:
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_json(path, values):
  """Writes plain values, the file as a whole and on disk."""
  with replacing(path, sync=True) as file:
    file.write((json.dumps(values, indent=2) + '\n').encode())


def write_config(workdir, config):
  """Writes the config.json of a workdir, by which other commands know the run: a dict."""
  write_json(pathlib.Path(workdir) / 'config.json', config)


def read_json(path):
  """Returns what `write_json` wrote.

  Raises:
    ValueError: if it is no JSON.
  """
  try:
    return json.loads(pathlib.Path(path).read_text())
  except ValueError as error:
    raise ValueError(f'{path} is damaged ({error}); remove it and run the command again') from error


def expect_writable(name, path):
  """Refuses a file or folder that cannot be made, before the work that would fill it.

  Args:
    name: key or flag, for the message.
    path: what it was set to.

  Raises:
    ValueError: if its folder, or the first above it that is there, does not take files.
  """
  folder = pathlib.Path(path).absolute()
  while not folder.is_dir() and folder != folder.parent:
    folder = folder.parent
  if not os.access(folder, os.W_OK):
    raise ValueError(f'{name}={path} cannot be written: {folder} takes no files; choose another')


@contextlib.contextmanager
def locked(folder, process_index, command):
  """Keeps others away from a host's share of a folder, where the file system can; else warns.

  Args:
    folder: made if missing.
    process_index: of the host.
    command: that works there, for the message.

  Raises:
    ValueError: if another process is at work there.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / f'lock-{process_index}', 'w', encoding='ascii') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(
        f'{folder}: another `{command}` is at work there; wait for its end'
      ) from error
    except OSError as error:
      if error.errno not in NO_LOCKS:
        raise
      _log.warning(
        '%s: this file system has no locks (%s), so that nothing keeps another `%s` of the same'
        ' away; start none', folder, error.strerror, command,
      )
    yield
