#!/usr/bin/env bash
# One host of a Cloud TPU VM slice: tpu_vm.sh has every host run this file of its own checkout.
#   idle               fails if fmzoo runs here
#   mount BUCKET PATH  mounts a bucket, with Cloud Storage FUSE, which is installed if missing
#   install            makes the environment in the checkout's .venv
#   start ARGUMENTS    starts fmzoo, which then needs no connection; log ~/fmzoo.log
#   stop               SIGTERM, on which fmzoo saves and leaves; waits for that
#   state              says whether fmzoo runs here

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

runs() { [ -e ~/fmzoo.pid ] && grep -qs fmzoo.main "/proc/$(cat ~/fmzoo.pid)/cmdline"; }

idle() {
  if runs; then
    echo "error: $(hostname) runs fmzoo already, expected an idle host; stop it first" >&2
    exit 2
  fi
}

mount_bucket() {  # name, folder
  mountpoint -q "$2" && return
  command -v gcsfuse > /dev/null || install_gcsfuse
  sudo mkdir -p "$2"
  sudo chown "$(id -un)" "$2"
  # Hosts look for files that another has just written: what is known of them is not kept.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$1" "$2"
}

install_gcsfuse() {
  local from=https://packages.cloud.google.com/apt keys=/usr/share/keyrings/cloud.google.asc
  curl -fsS "$from/doc/apt-key.gpg" | sudo tee "$keys" > /dev/null
  echo "deb [signed-by=$keys] $from gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  sudo apt-get -q update
  sudo apt-get -qy install gcsfuse
}

install() {
  idle
  # The runtimes' own Python is 3.10, older than jax takes.
  curl -LsSf https://astral.sh/uv/install.sh | sh
  ~/.local/bin/uv python install --quiet 3.12
  FMZOO_PYTHON="$(~/.local/bin/uv python find --system 3.12)"
  # shellcheck source=launch/environment.sh
  source launch/environment.sh
  fmzoo_environment '[tpu]'
}

start() {  # arguments of fmzoo
  idle
  # A background job leads no process group, so that setsid and nohup become python and keep the
  # number that is noted here.
  nohup setsid .venv/bin/python -m fmzoo.main "$@" >> ~/fmzoo.log 2>&1 < /dev/null &
  echo $! > ~/fmzoo.pid
  echo "$(hostname) runs fmzoo, log in ~/fmzoo.log"
}

stop() {
  local second
  runs && kill -TERM "$(cat ~/fmzoo.pid)"
  for second in $(seq 600); do
    runs || return 0
    sleep 1
  done
  echo "error: $(hostname) runs fmzoo after $second seconds, expected none; see ~/fmzoo.log" >&2
  exit 1
}

state() {
  if runs; then echo "$(hostname) runs fmzoo"; else echo "$(hostname) is idle"; fi
}

case "$1" in
  mount) mount_bucket "$2" "$3" ;;
  *) "$@" ;;
esac
