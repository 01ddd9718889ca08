"""How one of several processes ends when not all is well: at once, and with a line that says why.

Imports no jax: a command line that is refused ends here, too.
"""

import logging
import os
import subprocess
import sys

LAST_WORD = (
  'error: one of several processes came to its end by force: it was killed, or another one is gone'
  ' or never came (the lines above and the logs of the others say which); the same command on all'
  ' of them goes on from what is on disk'
)
# Waits until nobody holds the other end of its input.
_WATCHER = 'import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)'

_watcher = None


def watch():
  """Starts a small process that says LAST_WORD when this one ends without `say_goodbye`.

  When a peer is gone, jax ends this process from a thread of its own, with a trace of C++; nothing
  in here could speak after that.
  """
  global _watcher
  _watcher = subprocess.Popen(
    [sys.executable, '-I', '-S', '-c', _WATCHER, LAST_WORD], stdin=subprocess.PIPE,
    stdout=subprocess.DEVNULL, start_new_session=True,  # signals to this process's group spare it
  )


def is_watched():
  """Says whether this is one of several processes that `parallel.hosts.start` has joined."""
  return _watcher is not None


def say_goodbye():
  """Spares the last word: this process has told, or will tell, all there is."""
  global _watcher
  if _watcher is not None:
    _watcher.communicate(b'goodbye')
    _watcher = None


def leave(status, told=False):
  """Ends one of several processes at once; the others notice it. Alone it does nothing.

  An ordinary end waits for that of the others, who may wait for this one.

  Args:
    status: of the exit, not 0.
    told: whether the reason was told in a line that nothing need follow.
  """
  if is_watched():
    if told:
      say_goodbye()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
