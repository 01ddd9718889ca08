# shellcheck shell=bash
# Makes the virtual environment that the scripts beside this file run in. Sourced, not run.
#   FMZOO_VENV    where it is or shall be; default .venv in the repository
#   FMZOO_PYTHON  interpreter to make it with; default python3

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fmzoo_environment() {  # $1: extras such as [test]
  local venv="${FMZOO_VENV:-.venv}" python="${FMZOO_PYTHON:-python3}"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python is older than Python 3.11; name another in FMZOO_PYTHON" >&2
    exit 2
  }
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".${1:-}"
  PATH="$(cd "$venv/bin" && pwd):$PATH"
  export PATH
  # A CPU step allocates its work space anew each time; in huge pages that costs a third less time.
  export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
}
