#!/usr/bin/env bash
# Builds, tests and measures everything that needs a GPU, without a network:
#
#     bench/gpu.sh            # all of it; leaves bench/results/GPU.json and prints a short table last
#     bench/gpu.sh PART ...   # some of it: test sanitize measure profile rollouts
#     bench/gpu.sh --quick    # tiny sizes; without a GPU in Triton's interpreter: does it run?
#
#     test        the problem table and the properties of the GPU backends
#     sanitize    memcheck, racecheck, initcheck and synccheck on a part of it
#     measure     ceilings, the solver, the paper group, growth, alternatives, the training step around it
#     profile     Nsight Compute's summary of the kernels of a paper group
#     rollouts    trains a larger arithmetic model for four minutes and counts what is pruned on its rollouts
#
# A part that fails or takes too long does not stop the others; the exit status and the last line tell.
# Where a GPU is lent for minutes, call it twice: test first, then measure and profile, each with a LIMIT.
#
# Wants Python 3.10 or later with torch (a CUDA build; it brings Triton), g++, and nvcc for the CUDA
# backend. Other packages that are missing are installed from a folder of wheels:
#
#     PYTHON=python3          interpreter that has torch
#     WHEELS=bench/wheels     folder of wheels; made where there is a network by
#                             pip download --no-deps --only-binary=:all: --python-version 3.12 -d bench/wheels \
#                               scikit-build-core pathspec pybind11 cmake ninja pytest pluggy iniconfig pygments \
#                               hypothesis sortedcontainers click rich markdown-it-py mdurl safetensors matplotlib \
#                               contourpy cycler fonttools kiwisolver pillow pyparsing python-dateutil six POT scipy \
#                               py-cpuinfo packaging
#     BUILD=build/gpu         where all is installed to; nothing else on the machine changes
#     OUT=bench/results       folder of the record and the profiles; an older record of the same GPU is added to
#     LIMIT=3600              seconds after which it ends what it is doing, and prints the table
#     SHEAR_CUDA=ON           OFF: Triton only, without nvcc
#     COMMIT=                 the commit that is measured, for a copy of the sources without its history
set -euo pipefail
cd "$(dirname "$0")/.."
quick='' parts=''
for argument; do
  case $argument in
    --quick) quick=--quick ;;
    test | sanitize | measure | profile | rollouts) parts="$parts $argument" ;;
    *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"; [[ $argument == -h || $argument == --help ]]; exit ;;
  esac
done
parts=${parts:-test sanitize measure profile rollouts}
wanted() { case " $parts " in *" $1 "*) ;; *) return 1 ;; esac; }
PYTHON=${PYTHON:-python3} WHEELS=${WHEELS:-bench/wheels} BUILD=${BUILD:-build/gpu} OUT=${OUT:-bench/results} LIMIT=${LIMIT:-3600}
say() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }
fail() { echo "bench/gpu.sh: $1" >&2; exit 1; }
failed=''
attempt() { # NAME SECONDS COMMAND ...: ended after these seconds and at LIMIT; a failure is noted, and no more
  local name=$1 most=$2 left=$((LIMIT - SECONDS)) status=0
  shift 2
  if [ "$left" -lt 10 ]; then echo "$name: no time left"; failed="$failed, $name (no time)"; return; fi
  if [ "$most" -gt "$left" ] || [ -n "$quick" ]; then most=$left; fi
  say "$name"
  timeout -k 5 "$most" "$@" || status=$?
  [ "$status" = 0 ] || failed="$failed, $name (status $status)"
}

say "packages"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "PYTHON=$PYTHON is not Python 3.10 or later"
"$PYTHON" -c 'import torch, triton' || fail "PYTHON=$PYTHON has no torch, or no triton: install a CUDA build of torch"
mkdir -p "$BUILD" "$OUT"
BUILD=$(cd "$BUILD" && pwd) OUT=$(cd "$OUT" && pwd)
export PYTHONPATH=$BUILD${PYTHONPATH:+:$PYTHONPATH} PATH=$BUILD/bin:$PATH:/usr/local/cuda/bin PYTHONUNBUFFERED=1
if [ -d "$WHEELS" ]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$BUILD" "$WHEELS"/*.whl
fi
missing() {
  "$PYTHON" - "$@" <<'EOF'
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
EOF
}
absent=$(missing scikit_build_core pybind11 pytest hypothesis click rich safetensors matplotlib scipy cpuinfo numpy)
[ -z "$absent" ] || fail "Python packages are missing: $absent. Put their wheels into $WHEELS (WHEELS names another folder)"
[ -z "$(missing ot)" ] || echo "POT is missing: nothing is compared with it"
for tool in cmake ninja g++; do
  command -v "$tool" >/dev/null || fail "$tool is missing; wheels of cmake and ninja in $WHEELS serve too"
done

say "build"
gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
settings=()
if [ -n "$gpu" ]; then
  device=cuda
  # without nvcc it would build without the CUDA backend, and nobody would notice
  "$PYTHON" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' && export SHEAR_CUDA="${SHEAR_CUDA:-ON}"
  target=$("$PYTHON" -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability())')
  settings=(--config-settings=build-dir="$BUILD/cmake" --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="$target")
else
  [ -n "$quick" ] || fail "torch sees no GPU; --quick runs everything that needs none"
  device=cpu
  export TRITON_INTERPRET=1
fi
"$PYTHON" -m pip install --quiet --no-index --no-build-isolation --no-deps --upgrade --target "$BUILD" "${settings[@]}" .
"$PYTHON" -m shear_ops info
backends=$("$PYTHON" -c 'from shear_ops.ops import backends
print(*(n for n, why in backends.status().items() if n in ("cuda", "triton") and why is None))')
[ -n "$backends" ] || fail "no GPU backend can be used; shear-ops info above says why"
either=${backends// / or } default=${backends%% *}
if [ -z "$quick" ]; then
  record=$("$PYTHON" -c 'import torch
from bench.record import device_facts, slug
print(slug(device_facts(torch.device("cuda"))))').json
  [ -f "$OUT/$record" ] || [ ! -f "bench/results/$record" ] || cp "bench/results/$record" "$OUT/$record"
  record=$OUT/$record
else
  record=$BUILD/record.json
  rm -f "$record"
fi

pytest=("$PYTHON" -m pytest -q -p no:cacheprovider --tb=short -r f)
if wanted test; then
  if [ -n "$quick" ]; then
    attempt "tests of $backends" 300 "${pytest[@]}" -x tests/test_triton.py -k "chunks or strided"
  else
    several=()
    [ -n "$(missing xdist)" ] || several+=(-n 8)
    [ -n "$(missing pytest_timeout)" ] || several+=(--timeout=120 --timeout-method=thread)
    attempt "tests of $backends" 600 "${pytest[@]}" --maxfail=10 "${several[@]}" \
      tests/test_backends.py tests/test_triton.py tests/test_gpu.py -k "$either or test_gpu"
  fi
fi

if wanted sanitize && [ -n "$gpu" ]; then
  sanitizer=$(command -v compute-sanitizer || true)
  [ -n "$sanitizer" ] || failed="$failed, compute-sanitizer (not on the PATH)"
  for check in ${sanitizer:+memcheck racecheck initcheck synccheck}; do
    # memory of its own for every tensor, so that what lies beyond one is nobody's; not filled where that would hide a read
    attempt "compute-sanitizer $check" 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 POISON="$([ $check = initcheck ] || echo 1)" \
      "$sanitizer" --tool $check --error-exitcode 1 "${pytest[@]}" -x tests/test_backends.py \
      -k "against_float64 and ($either) and bfloat16 and (tails or paper or 50 or clusters or chamfer)"
  done
fi

run=("$PYTHON" -m bench.run)
# the interpreter as the tests have it: faster
[ -n "$gpu" ] || run=("$PYTHON" -c 'import sys; sys.path.append("tests")
from interpreter import patch_once; patch_once()
from bench.run import main; main()')
measure() { # ENTRY BACKEND ...
  attempt "$1 of $2" 120 "${run[@]}" --device "$device" --backend "$2" --only "$1" --no-tests $quick \
    --out "$record" "${@:3}"
}
if wanted measure; then
  measure ceilings "$default"
  for entry in solver paper-bf16 overhead growth; do
    for backend in $backends; do measure $entry "$backend"; done
  done
  measure small "$default"
  measure sinkhorn "$default"
  [ -n "$quick" ] || measure survivors "$default"
fi

if wanted profile && [ -n "$gpu" ]; then
  cat >"$BUILD/one_call.py" <<'EOF'
import sys
import torch
import shear_ops
from bench.problems import CONFIG, synthetic_group
with torch.device("cuda"):
    group = synthetic_group("clustered", 3000, 3584).to(torch.bfloat16)
    for _ in range(2):
        shear_ops.span_weights(**group.arguments(), config=CONFIG, backend=sys.argv[1])
EOF
  for backend in $backends; do
    attempt "profile of $backend" 90 env PYTHONPATH="$PWD:$PYTHONPATH" ncu --clock-control none \
      -k 'regex:sinkhorn|solve|token_cost|reduce_costs' --launch-count 12 \
      --section SpeedOfLight --section WarpStateStats --section SchedulerStats --section Occupancy \
      --log-file "${record%.json}-$backend-ncu.txt" "$PYTHON" "$BUILD/one_call.py" "$backend"
  done
fi

if wanted rollouts; then
  larger=(--problem-steps 100 --width 1024 --layers 8 --steps 20000 --minutes 4 --groups 4 --most 64)
  [ -z "$quick" ] || larger=(--problem-steps 12 --steps 2 --groups 1 --any-group)
  rm -f "$BUILD/larger.safetensors"  # an older one must not be counted in its place
  attempt "larger rollouts: training, sampling" 400 "$PYTHON" examples/arithmetic/record.py --device "$device" \
    "${larger[@]}" --out "$BUILD/larger.safetensors"
  if [ -f "$BUILD/larger.safetensors" ]; then
    for backend in $backends; do measure survivors "$backend" --rollouts "$BUILD/larger.safetensors"; done
  fi
fi

if [ -f "$record" ]; then
  say "what was measured"
  "$PYTHON" -m bench.report --short "$record"
fi
[ -z "$failed" ] || fail "not all well:${failed#,}"
