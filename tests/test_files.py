"""A file is there complete or as it was before."""

import pytest

from fmzoo import files


def test_a_failed_write_leaves_the_former_file(tmp_path):
  path = tmp_path / 'x'
  path.write_bytes(b'former')
  with pytest.raises(OSError, match='disk full'), files.replacing(path) as file:
    file.write(b'half')
    raise OSError('disk full')
  assert path.read_bytes() == b'former' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('sync', [False, True])
def test_a_file_and_its_folder_appear_at_the_end(tmp_path, sync):
  path = tmp_path / 'a' / 'x'
  with files.replacing(path, sync=sync) as file:
    file.write(b'whole')
    assert not path.exists()
  assert path.read_bytes() == b'whole' and list(path.parent.iterdir()) == [path]


def test_a_temporary_file_may_lie_elsewhere_and_takes_over_what_a_kill_left(tmp_path):
  path, temporary = tmp_path / 'x', tmp_path / 'folder' / 'x.tmp'
  temporary.parent.mkdir()
  temporary.write_bytes(b'left by a kill, and longer')
  with files.replacing(path, temporary=temporary) as file:
    file.write(b'whole')
    assert list(tmp_path.iterdir()) == [temporary.parent]
  assert path.read_bytes() == b'whole' and not temporary.exists()


def test_values_come_back_and_damage_is_one_line(tmp_path):
  path, values = tmp_path / 'x.json', {'a': [1, 2.5], 'b': None}
  files.write_json(path, values)
  assert files.read_json(path) == values
  path.write_text(path.read_text()[:-5])
  with pytest.raises(ValueError, match='x.json is damaged') as raised:
    files.read_json(path)
  assert '\n' not in str(raised.value)


def test_a_folder_that_takes_no_files_is_refused(tmp_path, monkeypatch):
  files.expect_writable('--workdir', tmp_path / 'a' / 'b')
  assert not (tmp_path / 'a').exists()
  monkeypatch.setattr(files.os, 'access', lambda path, mode: False)
  with pytest.raises(ValueError, match='--workdir=.*b cannot be written: .* takes no files'):
    files.expect_writable('--workdir', tmp_path / 'a' / 'b')
