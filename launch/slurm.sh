#!/usr/bin/env bash
# A job of several GPU nodes under SLURM, a process for each GPU, as JAX finds its place there.
#SBATCH --job-name=fmzoo
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

usage() {
  cat <<'END'
bash launch/slurm.sh install                                    makes the environment, once
sbatch [flags of sbatch] launch/slurm.sh ARGUMENTS              ARGUMENTS are those of fmzoo
bash launch/slurm.sh [--dry-run] [flags of sbatch --] ARGUMENTS

To be called in the folder of the checkout, on a file system that all nodes share. 2 nodes of 8 GPUs
for 24 hours unless flags of sbatch say otherwise: --nodes, --gpus-per-node with --ntasks-per-node
(the same number), --time, --partition, --account.

Ten minutes before the time is up, or when the job is preempted, fmzoo gets SIGTERM and saves; then
the job is queued again and goes on. scancel ends it for good. --dry-run, the first word, prints the
commands, one a line, and runs none.

environment: FMZOO_VENV and FMZOO_PYTHON as in launch/environment.sh
END
}

expect_process_each() {  # GPUs and processes of a node, empty where a flag does not say
  [ "${1##*:}" = "$2" ] || die "--gpus-per-node=$1 and --ntasks-per-node=$2 differ, expected one" \
    'process for each GPU; give both flags the same number'
}

submit() {  # flags of sbatch --, arguments; or arguments
  local word gpus='' tasks='' flags=()
  for word in "$@"; do
    if [ "$word" = -- ]; then
      while [ "$1" != -- ]; do
        flags+=("$1")
        case "$1" in
          --gpus-per-node=*) gpus="${1#*=}" ;;
          --ntasks-per-node=*) tasks="${1#*=}" ;;
        esac
        shift
      done
      shift
      break
    fi
  done
  expect_process_each "$gpus" "$tasks"
  expect_workdir "$PWD" "$@"
  run sbatch ${flags[@]+"${flags[@]}"} launch/slurm.sh "$@"
  if [ -n "$dry_run" ]; then
    job "$@"
  fi
}

job() {  # arguments: what the first node of the job does
  local python="${FMZOO_VENV:-.venv}/bin/python" status=0
  expect_workdir "$PWD" "$@"
  expect_process_each "${SLURM_GPUS_PER_NODE:-}" "${SLURM_NTASKS_PER_NODE:-}"
  [ -n "$dry_run" ] || [ -x "$python" ] || die "$python is missing, expected an environment of" \
    'fmzoo; make it with: bash launch/slurm.sh install'
  # srun does not take over the cores of a process from the job, and lets the others wait for one
  # that failed.
  run srun "--cpus-per-task=${SLURM_CPUS_PER_TASK:-8}" --kill-on-bad-exit=1 \
    "$python" -m fmzoo.main "$@" || status=$?
  if [ "$status" = 143 ]; then  # stopped by SIGTERM, all of it saved
    scontrol requeue "$SLURM_JOB_ID"
  fi
  return "$status"
}

# SLURM runs a copy of this file, from the folder where sbatch was called.
[ -e launch/lib.sh ] || {
  echo "error: $PWD is not the checkout, expected a folder with launch/lib.sh; call from there" >&2
  exit 2
}
# shellcheck source=launch/lib.sh
source launch/lib.sh
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi
case "${1:-}" in
  '' | -h | --help) usage ;;
  install)
    [ "${2:-}" != --dry-run ] || dry_run=yes
    # shellcheck source=launch/environment.sh
    run source launch/environment.sh
    run fmzoo_environment '[cuda]'
    ;;
  *) if [ -n "${SLURM_JOB_ID:-}" ]; then job "$@"; else submit "$@"; fi ;;
esac
