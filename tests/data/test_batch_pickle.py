"""Small pickles that would crash pickle.Unpickler or take its memory are refused at once."""

import pickle
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

from fmzoo.data import batch_pickle, cifar10

HEAD = b'\x80\x02'
DOUBLED = b')' + b'q\x00h\x00\x86' * 60  # a tuple of 2**60 empty ones
LONG = b'X' + (2 * 10**6).to_bytes(4, 'little') + b'a' * (2 * 10**6)
ENCODE = b'c_codecs\nencode\n'
LATIN1 = b'X\x06\x00\x00\x00latin1'


def recorded(data, shape=b'K\x02M\x00\x0c\x86', dtype=b'cnumpy\ndtype\nU\x02u1\x85R'):
  """Returns a batch of two labels; arguments are opcodes of parts of its array."""
  return (
    HEAD + b'}(U\x04data' + b'cnumpy.core.multiarray\n_reconstruct\n)R(K\x01' + shape + dtype
    + b'\x89' + data + b'tbU\x06labels](K\x01K\x02eu.'
  )


PIXELS = b'T\x00\x18\x00\x00' + bytes(6144)
HOSTILE = {  # a pickle, and what the message says
  'nested tuples as a key': (HEAD + b'})' + b'\x85' * 2_000_000 + b'Ns.', 'more than 200000 opc'),
  'nested tuples as a shorter key': (HEAD + b'})' + b'\x85' * 50_000 + b'Ns.', 'it has a key'),
  'doubled tuples as a key': (HEAD + b'}' + DOUBLED + b'Ns.', 'it has a key that is no text'),
  'a long key': (HEAD + b'}' + LONG + b'Ns.', 'it has a key that is no text of at most 100'),
  'a long name': (HEAD + b'c' + b'a' * 2_000_000 + b'\nb\n.', 'a name without an end in 100 bytes'),
  'a memo of 2**28': (HEAD + b'}r\x00\x00\x00\x10.', "its b'data' are no array"),
  'an index that was not put': (HEAD + b'j\x00\x00\x00\x10.', 'asks for number 268435456 of its m'),
  'one string encoded often': (
    HEAD + b'](' + LONG + b'q\x00' + (
      ENCODE + b'h\x00' + LATIN1 + b'\x86R'
    ) * 1000 + b'e.', 'it encodes more text than it holds',
  ),
  'bytes that are not there': (HEAD + b'T\xff\xff\xff\x7f.', 'it ends too early'),
  'text that is not there': (HEAD + b'X\xff\xff\xff\xff.', 'it ends too early'),
  'an opcode of later protocols': (HEAD + b'\x94.', "it has opcode b'.x94', which"),
  'an empty stack': (HEAD + b'q\x00.', 'it asks for values that it has not given'),
  'no mark': (HEAD + b'e.', 'it asks for values that it has not given'),
  'a list of no list': (HEAD + b'NNa.', 'it changes a list where there is none'),
  'a doubled dict': (HEAD + DOUBLED + b'.', 'it holds no dict but tuple'),
  'doubled data': (recorded(DOUBLED), 'its data are no bytes'),
  'a doubled shape': (recorded(PIXELS, shape=DOUBLED), 'its data have no shape of two numbers'),
  'a doubled dtype': (
    recorded(PIXELS, dtype=b'cnumpy\ndtype\n' + DOUBLED + b'\x85R'), 'its data are of no dtype',
  ),
  'doubled labels': (
    recorded(PIXELS).replace(b'](K\x01K\x02e', b'](' + b']' + b'q\x01](h\x01h\x01e' * 60 + b'e'),
    "its b'labels' are no list of numbers",
  ),
  'a label of 2000 bits': (
    recorded(PIXELS).replace(b'K\x02eu', b'\x8a\xff' + b'\x7f' * 255 + b'eu'), 'too large',
  ),
}


def test_what_hostile_pickles_are_made_of_is_read_otherwise():
  pixels, labels = cifar10._from_pickle('data_batch_1', recorded(PIXELS), 2)
  assert pixels.shape == (2, 32, 32, 3) and labels.tolist() == [1, 2]


@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_pickles_are_refused_at_once(case):
  content, message = HOSTILE[case]
  start = time.perf_counter()
  tracemalloc.start()
  try:
    with pytest.raises(ValueError, match=message) as error:
      cifar10._from_pickle('data_batch_1', content, 2)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  text = str(error.value)
  assert text.startswith('data_batch_1, ') and f'copy it from {cifar10.URL} again' in text
  assert '\n' not in text and len(text) < 300
  assert peak < 5e7 and time.perf_counter() - start < 20


def test_deep_objects_are_freed_without_a_crash():
  """In a process of its own, with little memory, because a failure would end the process."""
  code = (
    'import resource\n'
    'from fmzoo.data import batch_pickle\n'
    'resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\n'
    "name = b'cnumpy\\ndtype\\n'\n"
    "for nest in (b'\\x85', b'q\\0]h\\0a', b'q\\0}U\\1ah\\0s', b'q\\0' + name + b'h\\0\\x85R'):\n"
    "  batch_pickle.Pickle(b'\\x80\\x02N' + nest * 30_000 + b'.').load()\n"
    "print('done')"
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
  assert done.stdout == 'done\n', done.stderr


@pytest.mark.parametrize('names', [str, str.encode])
def test_a_whole_batch_is_within_the_bounds(names):
  """Ten thousand labels and file names, as Python 3 writes text and bytes; all bytes are >= 128."""
  rows = 10_000
  content = pickle.dumps({
    b'batch_label': b'training batch 1 of 5', b'labels': [row % 10 for row in range(rows)],
    b'data': np.full((rows, 3072), 255, np.uint8),
    b'filenames': [names(f'leptodactylus_pentadactylus_s_{row:06}.png') for row in range(rows)],
  }, protocol=2).replace(b'numpy._core.', b'numpy.core.')
  *_, most_bytes = cifar10.FORMS[1]
  assert len(content) <= most_bytes(rows)
  batch = batch_pickle.Pickle(content).load()
  assert len(batch[b'filenames']) == rows
  pixels, labels = cifar10._from_pickle('data_batch_1', content, rows)
  assert pixels.min() == 255 and labels[-1] == 9
