# shellcheck shell=bash
# What the launchers beside this file share: one-line errors, flags, commands run or printed.
# Sourced, not run. Kept to bash 3.2, which macOS has.

set -euo pipefail
command='' dry_run='' rest=()

die() {  # what is wrong: flag, value found, value expected, remedy
  echo "error: $*" >&2
  exit 2
}

quoted() {  # words: prints them on one line as a shell reads them back
  local word space='' quote="'" escaped="'\\''"
  for word in "$@"; do
    case "$word" in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//$quote/$escaped}'" ;;
    esac
    printf '%s%s' "$space" "$word"
    space=' '
  done
}

run() {  # a command: runs it, or prints it under --dry-run
  if [ -n "$dry_run" ]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

variable_of() { tr '[:lower:]-' '[:upper:]_' <<<"$1"; }  # of a flag without its dashes

# Sets variables A, B, ... from --a=value, or to yes where the flag is a switch, and rest to the
# words behind --.
parse() {  # the flags that are allowed, as 'a b switch!', then the words
  local allowed=" $1 " word name
  shift
  while [ $# -gt 0 ]; do
    word="$1" name="${1%%=*}"
    name="${name#--}"
    shift
    case "$word" in
      --) rest=("$@") && return ;;
      --help | -h) usage && exit 0 ;;
      --dry-run) dry_run=yes ;;
      --*=*)
        [[ "$allowed" == *" $name "* ]] || unknown "--$name" "$allowed"
        printf -v "$(variable_of "$name")" '%s' "${word#*=}"
        ;;
      *)
        [[ "$word" == --* && "$allowed" == *" $name! "* ]] || unknown "$word" "$allowed"
        printf -v "$(variable_of "$name")" yes
        ;;
    esac
  done
}

unknown() {  # word, flags that are allowed
  local flag expected=''
  for flag in $2; do
    case "$flag" in *!) expected+=" --${flag%!}" ;; *) expected+=" --$flag=VALUE" ;; esac
  done
  die "'$1' is not understood by '$command', expected$expected; correct it, or put what is for" \
    'fmzoo behind --'
}

need() {  # flags: each must have a value
  local flag variable
  for flag in "$@"; do
    variable="$(variable_of "$flag")"
    [ -n "${!variable:-}" ] || die "--$flag is missing, expected a value; give --$flag=VALUE" \
      "or set $variable"
  done
}

match() {  # flag, extended regular expression, example: an empty value passes
  local variable value
  variable="$(variable_of "$1")"
  value="${!variable:-}"
  [[ -z "$value" || "$value" =~ ^($2)$ ]] || die "--$1=$value is not understood, expected such as" \
    "$3; correct --$1 or $variable"
}

expect_workdir() {  # folder that is shared, arguments of fmzoo: refuses a run that would be lost
  local shared="$1" word workdir=''
  shift
  [ $# -gt 0 ] || die "nothing stands behind --, expected arguments of fmzoo; give such as" \
    "-- --config=configs/bfm_xl.py --workdir=$shared/runs/bfm_xl"
  case "$1" in prepare | bench) return ;; esac
  for word in "$@"; do
    case "$word" in --workdir=*) workdir="${word#*=}" ;; esac
  done
  [[ "$workdir" == /* ]] || die "--workdir=$workdir is no folder that all hosts see, expected an" \
    "absolute path; give such as --workdir=$shared/runs/bfm_xl"
}
