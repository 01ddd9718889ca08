#!/usr/bin/env bash
# A Cloud TPU VM slice: made, set up, given one command on all of its hosts, brought back, deleted.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/lib.sh
source "$root/launch/lib.sh"
NAME="${NAME:-}" ZONE="${ZONE:-}" ACCELERATOR="${ACCELERATOR:-}" VERSION="${VERSION:-}"

usage() {
  cat <<'END'
bash launch/tpu_vm.sh COMMAND [--flag=value ...] [-- arguments of python -m fmzoo.main]

commands
  create   makes a slice at once, or fails
  queue    asks for a slice and lets it come, as a queued resource
  install  copies this checkout to every host, or fetches --repository, and makes its environment
  run      starts fmzoo on all hosts; it goes on when the connection is lost
  logs     follows the log of host 0, or --worker=N, or --worker=all
  status   state of the slice, and which hosts run fmzoo
  stop     SIGTERM on all hosts: fmzoo saves and leaves; waits for that
  resume   brings a preempted slice back (deletes what is left of it, queues again, waits), then
           installs and runs; with the flags of queue, install and run. fmzoo goes on from its
           newest checkpoint
  delete   gives the slice back; gcloud asks first

flags, or environment variables of the same names in capitals
  --name         of the slice, and of its queued resource
  --zone         such as us-west4-a
  --project      default: that of gcloud's configuration
  --accelerator  such as v5litepod-16 (create, queue, resume)
  --version      of the runtime: v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv6e for v6e,
                 v2-alpha-tpuv5 for v5p, tpu-ubuntu2204-base for v4 and before
  --spot         cheaper, may be preempted (create, queue, resume)
  --repository   git address to install from in place of this checkout (install, resume)
  --bucket       name of a bucket that every host mounts at --mount, with Cloud Storage FUSE. It has
                 to be made with --enable-hierarchical-namespace: checkpoints are folders that move
  --mount        folder on the hosts, such as /mnt/fmzoo (install, run, resume)
  --worker       host, or all (logs)
  --poll         seconds between two looks at the slice; default 60 (resume)
  --dry-run      prints the commands, one a line, and runs none; supposes that the slice was queued
                 and, for resume, preempted

Workdir and data must be where all hosts see them: below --mount, or on a Filestore share.
END
}

slice() { run gcloud compute tpus "$@" "${where[@]}"; }

on_hosts() { slice tpu-vm ssh "$NAME" "--worker=$1" "--command=$2"; }  # which, shell line

host() { printf 'bash fmzoo/launch/tpu_host.sh %s' "$(quoted "$@")"; }  # words: a shell line

mounting() { [ -z "${BUCKET:-}" ] || printf '%s && ' "$(host mount "$BUCKET" "$MOUNT")"; }

create() {
  slice tpu-vm create "$NAME" "--accelerator-type=$ACCELERATOR" "--version=$VERSION" \
    ${SPOT:+--spot}
}

queue() {
  slice queued-resources create "$NAME" "--node-id=$NAME" "--accelerator-type=$ACCELERATOR" \
    "--runtime-version=$VERSION" ${SPOT:+--spot}
}

install() {
  local archive="${TMPDIR:-/tmp}/fmzoo-$NAME.tgz" line
  # The code of a running process must not change below it.
  line="if [ -e fmzoo/launch ]; then $(host idle); fi && "
  if [ -n "${REPOSITORY:-}" ]; then
    line+="git init --quiet fmzoo && git -C fmzoo fetch --depth=1 $(quoted "$REPOSITORY") HEAD"
    line+=' && git -C fmzoo checkout --quiet FETCH_HEAD'
  else
    run tar -C "$root" --exclude=./.git --exclude=./.venv --exclude=./.jax_cache --exclude=./runs \
      --exclude=./data --exclude=./weights -czf "$archive" .
    slice tpu-vm scp "$archive" "$NAME:fmzoo.tgz" --worker=all
    run rm "$archive"
    line+='mkdir -p fmzoo && tar -xzf fmzoo.tgz -C fmzoo'
  fi
  on_hosts all "$line && $(mounting)$(host install)"
}

start() { on_hosts all "$(mounting)$(host start "$@")"; }  # arguments of fmzoo

look() {  # queued-resources or tpu-vm, field, what a dry run supposes: sets found, MISSING if none
  local problem="${TMPDIR:-/tmp}/fmzoo-$NAME.problem"
  if [ -n "$dry_run" ]; then
    slice "$1" describe "$NAME" "--format=value($2)"
    found="$3"
  elif ! found="$(slice "$1" describe "$NAME" "--format=value($2)" 2> "$problem")"; then
    grep -q NOT_FOUND "$problem" || { cat "$problem" >&2; exit 1; }
    found=MISSING
  fi
}

resume() {  # arguments of fmzoo
  local request supposed=(SUSPENDED MISSING)
  while true; do
    look queued-resources state.state "${supposed[0]}"
    request="$found"
    look tpu-vm state "${supposed[1]}"
    case "$request/$found" in
      ACTIVE/READY | MISSING/READY) break ;;
      MISSING/MISSING) queue ;;
      MISSING/PREEMPTED | MISSING/TERMINATED) slice tpu-vm delete "$NAME" --quiet && queue ;;
      SUSPENDED/* | FAILED/* | ACTIVE/PREEMPTED | ACTIVE/TERMINATED)
        slice queued-resources delete "$NAME" --force --quiet
        queue
        ;;
      *) echo "waits for $NAME: queued resource $request, slice $found" >&2 ;;
    esac
    supposed=(ACTIVE READY)
    run sleep "${POLL:-60}"
  done
  install
  start "$@"
}

status() {
  look queued-resources state.state ACTIVE
  [ -n "$dry_run" ] || echo "queued resource: $found"
  look tpu-vm state READY
  [ -n "$dry_run" ] || echo "slice: $found"
  [ "$found" != READY ] || on_hosts all "$(host state)"
}

delete() {
  look queued-resources state.state ACTIVE
  if [ "$found" = MISSING ]; then
    slice tpu-vm delete "$NAME"
  else
    slice queued-resources delete "$NAME" --force
  fi
}

check() {  # flags of this command have been parsed
  need name zone
  case "$command" in create | queue | resume) need accelerator version ;; esac
  match name '[a-z]([a-z0-9-]*[a-z0-9])?' bfm-xl
  match zone '[a-z]+-[a-z]+[0-9]+-[a-z]' us-west4-a
  match accelerator 'v[0-9]+[a-z]*-[0-9]+' v5litepod-16
  match bucket '[a-z0-9][a-z0-9._-]+' 'my-bucket, a name without gs://'
  match mount '/[A-Za-z0-9._/-]+' /mnt/fmzoo
  match worker '[0-9]+|all' '0 or all'
  match poll '[0-9]+' 60
  [ -z "${BUCKET:-}" ] || need mount
  case "$command" in
    run | resume) expect_workdir "${MOUNT:-/mnt/fmzoo}" ${rest[@]+"${rest[@]}"} ;;
    *) [ ${#rest[@]} = 0 ] || die "'${rest[*]}' stands behind --, expected nothing with" \
      "'$command'; it is for run and resume" ;;
  esac
}

main() {
  local making='accelerator version spot!' setting='repository bucket mount' takes
  command="${1:-}"
  case "$command" in
    create | queue) takes="$making" ;;
    install) takes="$setting" ;;
    run) takes='bucket mount' ;;
    resume) takes="$making $setting poll" ;;
    logs) takes='worker' ;;
    status | stop | delete) takes='' ;;
    help | -h | --help) usage && exit 0 ;;
    *) die "command '$command' is unknown, expected create, queue, install, run, logs, status," \
      'stop, resume or delete; --help explains them' ;;
  esac
  shift
  parse "name zone project $takes" "$@"
  check
  where=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
  case "$command" in
    run) start "${rest[@]}" ;;
    resume) resume "${rest[@]}" ;;
    logs) on_hosts "${WORKER:-0}" 'tail -n 100 -F fmzoo.log' ;;
    stop) on_hosts all "$(host stop)" ;;
    *) "$command" ;;
  esac
}

main "$@"
