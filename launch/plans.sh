#!/usr/bin/env bash
# Compiles the XL recipes for TPU slices of every generation and writes docs/plans.md: an hour or
# more on two cores. Needs libtpu (pip install -e '.[tpu]'), no TPU.
#   bash launch/plans.sh

set -euo pipefail
cd "$(dirname "$0")/.."

plan() {  # recipe, slice, flags
  local config="$1" topology="$2"
  shift 2
  cat <<END

## \`$config\` on \`$topology\`

\`\`\`bash
fmzoo plan --config=$config --topology=$topology${*:+ $*}
\`\`\`

END
  python -m fmzoo.main plan "--config=$config" "--topology=$topology" "$@"
}

{
  cat <<END
# What the XL recipes take on slices of TPUs

Compiled ahead of time by the TPU's compiler on a machine without one: nothing here has run on a
TPU. Bytes and FLOPs are of one device and one call, GB = 1e9 bytes. \`available\` is what the
compiler leaves to a program. Traffic is that of the compiled program, as
\`fmzoo/parallel/collectives.py\` defines its bytes. Written by \`bash launch/plans.sh\` on $(date +%F),
libtpu $(python -c 'import libtpu; print(libtpu.__version__)').
END
  plan configs/bfm_xl.py v5e:2x4 --config.data.batch_size=240
  plan configs/bfm_xl.py v4:2x2x4 --nosampler
  plan configs/bfm_xl.py v5p:2x2x2 --nosampler
  plan configs/bfm_xl.py v6e:2x4 --config.mesh.fsdp=8 --nosampler
  plan configs/bfm_xl.py v5e:16x16 --config.mesh.fsdp=8 --nosampler
  plan configs/bfm_xl.py v5e:4x6 --config.data.batch_size=720 --config.mesh.segment=6 --nosampler
  plan configs/bfm_xl.py cpu:6 --config.data.batch_size=36 --nosampler
  plan configs/bfm_xl.py cpu:6 --config.data.batch_size=36 --config.mesh.segment=6 --nosampler
  plan configs/soflow.py:xl2 v5e:2x4 --config.mesh.fsdp=8
  plan configs/soflow.py:xl2 v4:2x2x4 --config.mesh.fsdp=4 --nosampler
  plan configs/soflow.py:xl2 v5p:2x2x2 --nosampler
  plan configs/soflow.py:xl2 v6e:2x4 --config.mesh.fsdp=8 --nosampler
  plan configs/soflow.py:xl2 v5e:16x16 --config.data.batch_size=1024 --config.mesh.fsdp=8 --nosampler
} > docs/plans.md.new
mv docs/plans.md.new docs/plans.md
