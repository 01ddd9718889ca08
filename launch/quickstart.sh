#!/usr/bin/env bash
# From a fresh clone to generated digits on a laptop: installs, trains, leaves pictures and numbers.
#   bash launch/quickstart.sh         SoFlow: one network call from noise to digit
#   bash launch/quickstart.sh bfm     BFM, then its feature residual network
#   bash launch/quickstart.sh sit     plain flow matching, the baseline
# Started again it goes on where it stopped. Results: runs/<recipe>/samples and evaluations.

source "$(dirname "$0")/environment.sh"

case "${1:-soflow}" in
  soflow) recipes=(soflow_digits) ;;
  bfm) recipes=(bfm_digits bfm_digits_frn) ;;
  sit) recipes=(sit_digits) ;;
  *) echo "error: quickstart '$1' is unknown; use soflow, bfm or sit" >&2; exit 2 ;;
esac

fmzoo_environment
for recipe in "${recipes[@]}"; do
  python -m fmzoo.main "--config=configs/$recipe.py" "--workdir=runs/$recipe"
done
for recipe in "${recipes[@]}"; do
  echo "pictures: runs/$recipe/samples    numbers: runs/$recipe/evaluations"
done
