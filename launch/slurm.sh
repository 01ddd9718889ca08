#!/usr/bin/env bash
# A job of several GPU nodes under SLURM, one process for each GPU, which is how JAX finds its place.
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

From the folder of the checkout, on a file system that all nodes share. 2 nodes of 8 GPUs for 24
hours unless flags of sbatch say otherwise: --nodes, --gpus-per-node and --ntasks-per-node (which are
equal), --time, --partition, --account.

Ten minutes before the time is up, or when the job is preempted, fmzoo gets SIGTERM and saves; the job
is then queued again and goes on. scancel ends it for good. --dry-run prints the commands, one a line,
and runs none.

environment: FMZOO_VENV and FMZOO_PYTHON as in launch/environment.sh
END
}

submit() {  # flags of sbatch --, arguments; or arguments
  local word flags=()
  for word in "$@"; do
    if [ "$word" = -- ]; then
      while [ "$1" != -- ]; do
        flags+=("$1")
        shift
      done
      shift
      break
    fi
  done
  expect_workdir "$PWD" "$@"
  run sbatch ${flags[@]+"${flags[@]}"} launch/slurm.sh "$@"
  if [ -n "$dry_run" ]; then
    job "$@"
  fi
}

job() {  # arguments: what the first node of the job does
  local python="${FMZOO_VENV:-.venv}/bin/python" status=0
  expect_workdir "$PWD" "$@"
  [ -n "$dry_run" ] || [ -x "$python" ] || die "$python is missing, expected an environment of" \
    'fmzoo; make it with: bash launch/slurm.sh install'
  # One process that fails would leave the others waiting.
  run srun --kill-on-bad-exit=1 "$python" -m fmzoo.main "$@" || status=$?
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
    # shellcheck source=launch/environment.sh
    source launch/environment.sh
    fmzoo_environment '[cuda]'
    ;;
  *) if [ -n "${SLURM_JOB_ID:-}" ]; then job "$@"; else submit "$@"; fi ;;
esac
