"""The launchers: what they would run, what they run, what they refuse; no cloud is asked."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from fmzoo import main

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / 'launch').glob('*.sh'))
RECORDED = ('kubectl', 'docker', 'sbatch', 'srun', 'scontrol', 'ssh', 'tar', 'rm', 'sleep')
RECORD = '{ printf "%s\\0" "${0##*/}" "$@"; echo; } >> "$CALLS"'
GCLOUD = """
state() { if grep -q MISSING "$1"; then echo NOT_FOUND >&2; exit 1; else cat "$1"; fi; }
case "$*" in
  *'queued-resources describe'*) state "$CLOUD/queue" ;;
  *'tpu-vm describe'*) state "$CLOUD/node" ;;
  *'queued-resources create'*) echo ACTIVE > "$CLOUD/queue"; echo READY > "$CLOUD/node" ;;
  *'queued-resources delete'*) echo MISSING | tee "$CLOUD/queue" > "$CLOUD/node" ;;
  *'tpu-vm delete'*) echo MISSING > "$CLOUD/node" ;;
esac
"""
HOST = """
case "$*" in
  *'tpu-vm scp'*) cp "$5" "$HOME/fmzoo.tgz" ;;
  *'tpu-vm ssh'*) for word in "$@"; do
    case "$word" in --command=*) cd "$HOME" && exec bash -c "${word#*=}" ;; esac
  done ;;
esac
"""

SLICE = ('--name=bfm-xl', '--zone=us-west4-a')
MAKING = ('--accelerator=v5litepod-16', '--version=v2-alpha-tpuv5-lite')
BUCKET = ('--bucket=my-bucket', '--mount=/mnt/fmzoo')
TRAIN = (
  '--', '--config=configs/bfm_xl.py', '--workdir=/mnt/fmzoo/it\'s "a" run',
  '--config.sample.labels=3, 1',
)
GKE = (
  '--name=bfm-xl', '--image=us-docker.pkg.dev/p/fmzoo/fmzoo:1', '--topology=4x4',
  '--accelerator=tpu-v5-lite-podslice',
)
# name: (script, words, words that it prints)
COMMANDS = {
  'create': ('tpu_vm.sh', ('create', *SLICE, *MAKING, '--spot'), ('tpu-vm create', '--spot')),
  'queue': ('tpu_vm.sh', ('queue', *SLICE, *MAKING, '--project=p'), (
    'queued-resources create bfm-xl', '--node-id=bfm-xl', '--project=p')),
  'install': ('tpu_vm.sh', ('install', *SLICE, *BUCKET), (
    'tpu-vm scp', 'tpu_host.sh mount my-bucket /mnt/fmzoo', 'tpu_host.sh install')),
  'install by git': (
    'tpu_vm.sh', ('install', *SLICE, '--repository=https://host/fmzoo.git'), (
      'git -C fmzoo fetch --depth=1 https://host/fmzoo.git', 'tpu_host.sh install')),
  'run': ('tpu_vm.sh', ('run', *SLICE, *BUCKET, *TRAIN), (
    '--worker=all', 'mount my-bucket', 'tpu_host.sh start --config=configs/bfm_xl.py')),
  'logs': ('tpu_vm.sh', ('logs', *SLICE), ('--worker=0', 'tail')),
  'logs of all': ('tpu_vm.sh', ('logs', *SLICE, '--worker=all'), ('--worker=all',)),
  'status': ('tpu_vm.sh', ('status', *SLICE), ('describe', 'tpu_host.sh state')),
  'stop': ('tpu_vm.sh', ('stop', *SLICE), ('--worker=all', 'tpu_host.sh stop')),
  'resume': ('tpu_vm.sh', ('resume', *SLICE, *MAKING, *BUCKET, *TRAIN), (
    'delete bfm-xl --force --quiet', 'queued-resources create', 'tpu_host.sh start')),
  'delete': ('tpu_vm.sh', ('delete', *SLICE), ('queued-resources delete bfm-xl --force',)),
  'image': ('gke.sh', ('image', '--image=us-docker.pkg.dev/p/fmzoo/fmzoo:1'), ('docker push',)),
  'gke logs': ('gke.sh', ('logs', '--name=bfm-xl', '--worker=3'), (
    'kubectl logs', 'job-completion-index=3')),
  'gke delete': ('gke.sh', ('delete', '--name=bfm-xl'), ('kubectl delete jobset bfm-xl',)),
}


@pytest.fixture
def world(tmp_path):
  """An environment whose PATH has stand-ins first: they only note how they were called."""
  for folder in ('bin', 'cloud', 'home'):
    (tmp_path / folder).mkdir()
  for name in RECORDED:
    program(tmp_path / 'bin' / name, RECORD)
  program(tmp_path / 'bin' / 'gcloud', RECORD + GCLOUD)
  (tmp_path / 'cloud' / 'queue').write_text('SUSPENDED\n')
  (tmp_path / 'cloud' / 'node').write_text('MISSING\n')
  return {
    'PATH': f'{tmp_path}/bin:/usr/bin:/bin', 'HOME': f'{tmp_path}/home', 'TMPDIR': str(tmp_path),
    'CALLS': f'{tmp_path}/calls', 'CLOUD': f'{tmp_path}/cloud',
  }


def program(path, text):
  """Writes a shell script that can be called."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'#!/usr/bin/env bash\n{text}\n')
  path.chmod(0o755)
  return path


def launch(world, script, *words, **more):
  """Runs a launcher; returns what subprocess.run does."""
  return subprocess.run(
    ['bash', script if '/' in script else f'launch/{script}', *words], cwd=ROOT,
    env={**world, **more}, capture_output=True, text=True, timeout=60,
  )


def calls(world):
  """Returns the argument lists with which stand-ins were called, in order."""
  path = pathlib.Path(world['CALLS'])
  lines = path.read_text().split('\0\n')[:-1] if path.exists() else []
  return [line.split('\0') for line in lines]


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
  folder = pathlib.Path(sys.executable).parent
  checker = shutil.which('shellcheck', path=f'{folder}:{os.environ["PATH"]}')
  found = subprocess.run(
    [checker, '-x', '-P', 'SCRIPTDIR', script], capture_output=True, text=True, cwd=ROOT)
  assert found.returncode == 0, found.stdout


@pytest.mark.parametrize('script', ['tpu_vm.sh', 'gke.sh', 'slurm.sh'])
def test_help_names_the_flags(world, script):
  shown = launch(world, script, '--help')
  assert shown.returncode == 0 and '--dry-run' in shown.stdout and calls(world) == []


@pytest.mark.parametrize('name', COMMANDS)
def test_a_dry_run_prints_what_is_run_and_runs_nothing(world, name):
  """A shell reads the printed lines back as the very argument lists of the run itself."""
  script, (command, *words), expected = COMMANDS[name]
  dry = launch(world, script, command, '--dry-run', *words)
  assert (dry.returncode, dry.stderr) == (0, '') and calls(world) == []
  for line in dry.stdout.splitlines():
    subprocess.run(['bash', '-n', '-c', line], check=True)
  assert not [phrase for phrase in expected if phrase not in dry.stdout]
  if name in ('status', 'delete'):
    pathlib.Path(world['CLOUD'], 'queue').write_text('ACTIVE\n')
    pathlib.Path(world['CLOUD'], 'node').write_text('READY\n')
  assert launch(world, script, command, *words).returncode == 0
  assert calls(world) == [shlex.split(line) for line in dry.stdout.splitlines()]


@pytest.mark.parametrize('queue,node,expected', [
  ('ACTIVE', 'READY', []),
  ('MISSING', 'READY', []),
  ('MISSING', 'MISSING', ['queued-resources create']),
  ('MISSING', 'PREEMPTED', ['tpu-vm delete', 'queued-resources create']),
  ('SUSPENDED', 'MISSING', ['queued-resources delete', 'queued-resources create']),
  ('FAILED', 'MISSING', ['queued-resources delete', 'queued-resources create']),
  ('ACTIVE', 'PREEMPTED', ['queued-resources delete', 'queued-resources create']),
  ('WAITING_FOR_RESOURCES', 'MISSING', []),
  ('SUSPENDING', 'PREEMPTED', []),
])
def test_resume_queues_again_only_what_is_lost(world, tmp_path, queue, node, expected):
  (tmp_path / 'cloud' / 'queue').write_text(queue)
  (tmp_path / 'cloud' / 'node').write_text(node)
  come = 'echo ACTIVE > "$CLOUD/queue"; echo READY > "$CLOUD/node"'
  program(tmp_path / 'bin' / 'sleep', f'{RECORD}; {come}')
  assert launch(world, 'tpu_vm.sh', 'resume', *SLICE, *MAKING, *TRAIN).returncode == 0
  verbs = [' '.join(call[3:5]) for call in calls(world) if call[0] == 'gcloud']
  assert [verb for verb in verbs if verb.split()[1] in ('create', 'delete')] == expected
  assert 'tpu_host.sh start' in calls(world)[-1][7]


def test_resume_ends_where_the_cloud_cannot_be_asked(world, tmp_path):
  program(tmp_path / 'bin' / 'gcloud', f'{RECORD}; echo "no permission" >&2; exit 1')
  ended = launch(world, 'tpu_vm.sh', 'resume', *SLICE, *MAKING, *TRAIN)
  assert ended.returncode == 1 and 'no permission' in ended.stderr and len(calls(world)) == 1


def test_fmzoo_runs_detached_on_a_host_until_it_is_stopped(world, tmp_path):
  """A process that outlives its connection, gets every argument whole, and SIGTERM."""
  program(tmp_path / 'bin' / 'gcloud', HOST)
  os.remove(tmp_path / 'bin' / 'sleep')
  shutil.copytree(ROOT / 'launch', tmp_path / 'home' / 'fmzoo' / 'launch')
  program(tmp_path / 'home' / 'fmzoo' / '.venv' / 'bin' / 'python', """
    trap 'echo saved; exit 143' TERM
    printf '<%s>' "$@"; echo
    for turn in $(seq 400); do sleep 0.05; done""")  # not for ever, should the test fail
  log = tmp_path / 'home' / 'fmzoo.log'

  def call(command, *words):
    return launch(world, 'tpu_vm.sh', command, *SLICE, *words)

  started = call('run', *TRAIN)
  assert started.returncode == 0, started.stderr
  try:
    again = call('run', *TRAIN)
    assert again.returncode == 2 and 'error: ' in again.stderr and 'stop it first' in again.stderr
    assert call('install', '--repository=https://host/fmzoo.git').returncode == 2
  finally:
    assert call('stop').returncode == 0
  said = ''.join(f'<{word}>' for word in ('-m', 'fmzoo.main', *TRAIN[1:]))
  assert log.read_text().splitlines() == [said, 'saved']
  state = subprocess.run(
    ['bash', tmp_path / 'home' / 'fmzoo' / 'launch' / 'tpu_host.sh', 'state'], env=world,
    capture_output=True, text=True)
  assert 'is idle' in state.stdout


def test_install_copies_the_code_and_not_what_it_made(world, tmp_path):
  checkout, home = tmp_path / 'checkout', tmp_path / 'home'
  shutil.copytree(ROOT / 'launch', checkout / 'launch')
  program(checkout / 'launch' / 'tpu_host.sh', 'echo "$@" >> "$CALLS"')
  for path in ('fmzoo/data/x.py', 'configs/x.py', 'data/big', 'runs/a/b', '.git/x', '.venv/x'):
    (checkout / path).parent.mkdir(parents=True, exist_ok=True)
    (checkout / path).write_text(path)
  program(tmp_path / 'bin' / 'gcloud', HOST)
  os.remove(tmp_path / 'bin' / 'tar')
  for _ in range(2):  # again, over what is there
    script = str(checkout / 'launch' / 'tpu_vm.sh')
    assert launch(world, script, 'install', *SLICE, *BUCKET).returncode == 0
  assert sorted(path.name for path in (home / 'fmzoo').iterdir()) == ['configs', 'fmzoo', 'launch']
  assert (home / 'fmzoo' / 'fmzoo' / 'data' / 'x.py').read_text() == 'fmzoo/data/x.py'
  said = pathlib.Path(world['CALLS']).read_text().splitlines()
  assert [line for line in said if '\0' not in line] == [
    'mount my-bucket /mnt/fmzoo', 'install', 'idle', 'mount my-bucket /mnt/fmzoo', 'install']


def test_a_host_makes_its_environment_with_the_tpu_extra(world, tmp_path):
  checkout, uv = tmp_path / 'fmzoo', f'{RECORD}; [ "$2" != find ] || echo "{sys.executable}"'
  shutil.copytree(ROOT / 'launch', checkout / 'launch')
  program(tmp_path / 'home' / '.local' / 'bin' / 'uv', uv)
  program(checkout / '.venv' / 'bin' / 'python', RECORD)
  program(tmp_path / 'bin' / 'curl', 'echo true')
  made = launch(world, str(checkout / 'launch' / 'tpu_host.sh'), 'install')
  assert made.returncode == 0, made.stderr
  assert calls(world)[-1][:4] == ['python', '-m', 'pip', 'install']
  assert calls(world)[-1][-2:] == ['--editable', '.[tpu]']


@pytest.mark.parametrize('is_mounted', [False, True])
def test_a_host_mounts_a_bucket_once(world, tmp_path, is_mounted):
  program(tmp_path / 'bin' / 'mountpoint', f'exit {int(not is_mounted)}')
  program(tmp_path / 'bin' / 'sudo', '"$@"')
  program(tmp_path / 'bin' / 'gcsfuse', RECORD)
  folder = str(tmp_path / 'mounted')
  assert launch(world, 'tpu_host.sh', 'mount', 'my-bucket', folder).returncode == 0
  assert [call[-2:] for call in calls(world)] == ([] if is_mounted else [['my-bucket', folder]])


@pytest.mark.parametrize('flags', [(), ('--nodes=4', '--partition=gpu', '--')])
def test_a_slurm_job_is_submitted_as_the_dry_run_says(world, flags):
  dry = launch(world, 'slurm.sh', '--dry-run', *flags, *TRAIN[1:])
  assert dry.returncode == 0 and calls(world) == []
  printed = [shlex.split(line) for line in dry.stdout.splitlines()]
  assert launch(world, 'slurm.sh', *flags, *TRAIN[1:]).returncode == 0
  assert calls(world) == [['sbatch', *flags[:-1], 'launch/slurm.sh', *TRAIN[1:]]] == printed[:1]
  assert printed[1][0] == 'srun' and printed[1][-len(TRAIN[1:]) :] == [*TRAIN[1:]]


@pytest.mark.parametrize('status,requeued', [(0, False), (143, True), (1, False)])
def test_a_slurm_job_that_was_stopped_is_queued_again(world, tmp_path, status, requeued):
  program(tmp_path / 'bin' / 'srun', f'{RECORD}; exit {status}')
  program(tmp_path / 'venv' / 'bin' / 'python', '')
  job = {'SLURM_JOB_ID': '7', 'FMZOO_VENV': f'{tmp_path}/venv', 'SLURM_CPUS_PER_TASK': '6'}
  assert launch(world, 'slurm.sh', *TRAIN[1:], **job).returncode == status
  srun, *after = calls(world)
  assert srun[-len(TRAIN[1:]) :] == [*TRAIN[1:]] and '--cpus-per-task=6' in srun
  assert after == ([['scontrol', 'requeue', '7']] if requeued else [])


def test_slurm_reads_every_directive():
  """sbatch reads none behind the first command."""
  lines = (ROOT / 'launch' / 'slurm.sh').read_text().splitlines()
  head = lines[: next(i for i, line in enumerate(lines) if not line.startswith('#'))]
  directives = dict(line[8:].strip('-').partition('=')[::2] for line in lines if '#SBATCH' in line)
  assert sum(line.startswith('#SBATCH') for line in head) == len(directives)
  assert directives['gpus-per-node'] == directives['ntasks-per-node']
  assert directives['signal'].startswith('TERM@') and 'requeue' in directives


@pytest.mark.parametrize('volume,hosts', [
  (('--claim=shared',), 4),
  (('--bucket=my-bucket', '--spot', '--service-account=trainer', '--chips=8'), 2),
])
def test_the_manifest_asks_for_the_slice(world, tmp_path, volume, hosts):
  dry = launch(world, 'gke.sh', 'apply', '--dry-run', *GKE, *volume, *TRAIN)
  assert dry.returncode == 0 and calls(world) == []
  subprocess.run(['bash', '-n', '-c', dry.stdout], check=True)
  first, *text, last = dry.stdout.splitlines()
  manifest = yaml.safe_load('\n'.join(text))
  job = manifest['spec']['replicatedJobs'][0]['template']['spec']
  pod, container = job['template']['spec'], job['template']['spec']['containers'][0]
  assert job['parallelism'] == job['completions'] == hosts and job['backoffLimit'] == 0
  assert container['args'] == [*TRAIN[1:]]
  assert container['resources']['limits']['google.com/tpu'] * hosts == 16
  assert pod['nodeSelector']['cloud.google.com/gke-tpu-topology'] == '4x4'
  assert ('cloud.google.com/gke-spot' in pod['nodeSelector']) == ('--spot' in volume)
  assert pod['restartPolicy'] == 'Never' and pod['terminationGracePeriodSeconds'] == 600
  assert manifest['spec']['failurePolicy']['maxRestarts'] == 100
  (rule,) = job['podFailurePolicy']['rules']
  assert rule['onExitCodes']['values'] == [main.REFUSED] and rule['action'] == 'FailJob'
  assert pod['volumes'][0]['name'] == container['volumeMounts'][0]['name']
  assert {'persistentVolumeClaim', 'csi'} & pod['volumes'][0].keys() == {
    'persistentVolumeClaim' if '--claim=shared' in volume else 'csi'}
  program(tmp_path / 'bin' / 'kubectl', f'{RECORD}; cat > "$CLOUD/manifest"')
  assert launch(world, 'gke.sh', 'apply', *GKE, *volume, *TRAIN).returncode == 0
  assert yaml.safe_load((tmp_path / 'cloud' / 'manifest').read_text()) == manifest
  assert calls(world) == [shlex.split(first)[:3]]


def test_the_image_takes_what_is_there():
  lines = (ROOT / 'launch' / 'Dockerfile').read_text().splitlines()
  sources = [word for line in lines if line.startswith('COPY') for word in line.split()[1:-1]]
  assert 'fmzoo' in sources and all((ROOT / source).exists() for source in sources)


# script, words, words of the line
REFUSALS = [
  ('tpu_vm.sh', (), ("command ''", 'create', '--help')),
  ('tpu_vm.sh', ('creat', *SLICE), ("'creat'", 'create')),
  ('tpu_vm.sh', ('create', '--zone=us-west4-a', *MAKING), ('--name', 'missing', 'NAME')),
  ('tpu_vm.sh', ('create', *SLICE), ('--accelerator', 'missing', 'ACCELERATOR')),
  ('tpu_vm.sh', ('queue', *SLICE, '--accelerator=v5litepod-8'), ('--version', 'missing')),
  ('tpu_vm.sh', ('create', *SLICE, '--accelerator=v5e', '--version=x'), ('v5e', 'v5litepod-16')),
  ('tpu_vm.sh', ('status', '--name=a', '--zone=us-west4'), ('--zone=us-west4', 'us-west4-a')),
  ('tpu_vm.sh', ('status', '--name=A_b', '--zone=us-west4-a'), ('--name=A_b', 'bfm-xl')),
  ('tpu_vm.sh', ('status', *SLICE, '--spot'), ("'--spot'", 'status', '--project')),
  ('tpu_vm.sh', ('create', *SLICE, '--spott'), ("'--spott'", '--spot')),
  ('tpu_vm.sh', ('create', *SLICE, '--spot=yes'), ("'--spot'", '--spot')),
  ('tpu_vm.sh', ('create', *SLICE, 'word'), ("'word'", '--accelerator', '--')),
  ('tpu_vm.sh', ('logs', *SLICE, '--worker=first'), ('--worker=first', 'all')),
  ('tpu_vm.sh', ('install', *SLICE, '--bucket=gs://b'), ('gs://b', 'without gs://')),
  ('tpu_vm.sh', ('install', *SLICE, '--bucket=my-bucket'), ('--mount', 'missing')),
  ('tpu_vm.sh', ('install', *SLICE, '--mount=here'), ('--mount=here', '/mnt/fmzoo')),
  ('tpu_vm.sh', ('stop', *SLICE, '--', 'x'), ("'x'", 'stop', 'run and resume')),
  ('tpu_vm.sh', ('run', *SLICE), ('nothing', '--config')),
  ('tpu_vm.sh', ('run', *SLICE, '--', '--config=x'), ('--workdir=', 'absolute')),
  ('tpu_vm.sh', ('run', *SLICE, '--', '--workdir=gs://b/x'), ('gs://b/x', 'absolute')),
  ('slurm.sh', ('--config=x', '--workdir=runs/x'), ('--workdir=runs/x', 'absolute')),
  ('slurm.sh', ('--gpus-per-node=4', *TRAIN), ('--gpus-per-node=4', '--ntasks-per-node')),
  ('gke.sh', ('aply',), ("'aply'", 'apply')),
  ('gke.sh', ('image',), ('--image', 'missing')),
  ('gke.sh', ('logs', '--name=a', '--worker=all'), ('--worker=all',)),
  ('gke.sh', ('apply', '--name=a', *TRAIN), ('--image', 'missing')),
  ('gke.sh', ('apply', *GKE, '--topology=4', '--claim=c', *TRAIN), ('--topology=4', '4x4')),
  ('gke.sh', ('apply', *GKE, '--topology=1x3', '--claim=c', *TRAIN), ('3', '--chips=4')),
  ('gke.sh', ('apply', *GKE, *TRAIN), ('--claim', '--bucket', 'missing')),
  ('gke.sh', ('apply', *GKE, '--claim=c', '--bucket=bb', *TRAIN), ('--claim=c', '--bucket=bb')),
  ('gke.sh', ('apply', *GKE, '--claim=c: d', *TRAIN), ('--claim=c: d',)),
  ('gke.sh', ('apply', *GKE, '--claim=c'), ('nothing', '--config')),
]


@pytest.mark.parametrize('script,words,expected', REFUSALS)
def test_bad_flags_are_one_line_and_run_nothing(world, script, words, expected):
  refused = launch(world, script, *words)
  assert refused.returncode == 2 and calls(world) == [] and refused.stdout == ''
  (line,) = refused.stderr.splitlines()
  assert line.startswith('error: ') and 'expected' in line
  assert not [word for word in expected if word not in line], line


def test_a_slurm_job_without_environment_says_how_to_make_one(world, tmp_path):
  refused = launch(world, 'slurm.sh', *TRAIN[1:], SLURM_JOB_ID='7', FMZOO_VENV=str(tmp_path))
  assert refused.returncode == 2 and calls(world) == []
  assert 'slurm.sh install' in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_settings_may_come_from_the_environment(world):
  environment = {'NAME': 'bfm-xl', 'ZONE': 'us-west4-a', 'PROJECT': 'p'}
  by_flag = launch(world, 'tpu_vm.sh', 'status', *SLICE, '--project=p', '--dry-run')
  assert launch(world, 'tpu_vm.sh', 'status', '--dry-run', **environment).stdout == by_flag.stdout


def test_an_environment_is_not_made_under_dry_run(tmp_path):
  done = subprocess.run(
    ['bash', 'launch/slurm.sh', 'install', '--dry-run'], cwd=ROOT, text=True, capture_output=True,
    env={**os.environ, 'FMZOO_PYTHON': f'{tmp_path}/none', 'FMZOO_VENV': f'{tmp_path}/venv'},
  )
  assert done.returncode == 0, done.stderr
  assert 'fmzoo_environment' in done.stdout and not any(tmp_path.iterdir())
