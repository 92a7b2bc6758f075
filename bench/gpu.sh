#!/usr/bin/env bash
# Builds, tests and measures everything that needs a GPU, in under ten minutes, without a network:
#
#     bench/gpu.sh            # all of it; leaves bench/results/GPU.json and prints a short table last
#     bench/gpu.sh PART ...   # some of it: test sanitize measure rollouts profile
#     bench/gpu.sh --quick    # tiny sizes; without a GPU in Triton's interpreter: does it run?
#
#     test        the problem table and the properties of the GPU backends
#     sanitize    memcheck, racecheck, initcheck and synccheck on a part of it
#     measure     ceilings, the solver, the paper group, growth, alternatives, the training step around it
#     rollouts    trains a larger arithmetic model and counts what is pruned on its rollouts
#     profile     Nsight Compute's summary of the kernels of a paper group
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
#     LIMIT=540               seconds after which no further measurement is started
set -euo pipefail
cd "$(dirname "$0")/.."
quick='' parts=''
for argument; do
  case $argument in
    --quick) quick=--quick ;;
    test | sanitize | measure | rollouts | profile) parts="$parts $argument" ;;
    *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"; [[ $argument == -h || $argument == --help ]]; exit ;;
  esac
done
parts=${parts:-test sanitize measure rollouts profile}
wanted() { case " $parts " in *" $1 "*) ;; *) return 1 ;; esac; }
PYTHON=${PYTHON:-python3} WHEELS=${WHEELS:-bench/wheels} BUILD=${BUILD:-build/gpu} LIMIT=${LIMIT:-540}
say() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }
fail() { echo "bench/gpu.sh: $1" >&2; exit 1; }

say "packages"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "PYTHON=$PYTHON is not Python 3.10 or later"
"$PYTHON" -c 'import torch, triton' || fail "PYTHON=$PYTHON has no torch, or no triton: install a CUDA build of torch"
mkdir -p "$BUILD"
BUILD=$(cd "$BUILD" && pwd)
export PYTHONPATH=$BUILD PATH=$BUILD/bin:$PATH PYTHONUNBUFFERED=1
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
"$PYTHON" -m pip install --quiet --no-index --no-build-isolation --no-deps --upgrade --target "$BUILD" .
gpu=$("$PYTHON" -c 'import torch; print(int(torch.cuda.is_available()))')
if [ "$gpu" = 1 ]; then
  device=cuda
else
  [ -n "$quick" ] || fail "torch sees no GPU; --quick runs everything that needs none"
  device=cpu
  export TRITON_INTERPRET=1
fi
"$PYTHON" -m shear_ops info
backends=$("$PYTHON" -c 'from shear_ops import backends
print(*(n for n, why in backends.status().items() if n in ("cuda", "triton") and why is None))')
[ -n "$backends" ] || fail "no GPU backend can be used; shear-ops info above says why"
either=${backends// / or }

if ! wanted test; then
  echo "tests: not run"
elif say "tests on $device: $backends"; [ -n "$quick" ]; then
  "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/test_triton.py -k "chunks or strided"
else
  "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_backends.py tests/test_triton.py -k "$either" -r f ||
    fail "the tests fail, so nothing is measured"
fi

failed=
sanitizer=$(command -v compute-sanitizer || true)
if ! wanted sanitize; then
  echo "compute-sanitizer: not wanted"
elif [ "$gpu" = 1 ] && [ -n "$sanitizer" ]; then
  for check in memcheck racecheck initcheck synccheck; do
    if [ "$SECONDS" -gt $((LIMIT / 2)) ]; then echo "no time left for compute-sanitizer $check"; continue; fi
    say "compute-sanitizer $check"
    timeout 90 "$sanitizer" --tool "$check" --error-exitcode 1 "$PYTHON" -m pytest -q -x -p no:cacheprovider \
      tests/test_backends.py -k "against_float64 and ($either) and bfloat16 and (tails or chamfer or two_clusters)" ||
      failed="$failed $check"
  done
else
  echo "compute-sanitizer: not run (no GPU, or it is not on the PATH)"
fi

record=$BUILD/record.json
[ -n "$quick" ] || record=$("$PYTHON" -c 'import torch
from bench.record import RESULTS, device_facts, slug
print(RESULTS / f"{slug(device_facts(torch.device("cuda")))}.json")')
rm -f "$BUILD/record.json"
measure() { # ENTRY BACKEND ...: an entry, if there is time for it
  if [ "$SECONDS" -gt "$LIMIT" ]; then echo "no time left for $1 of $2"; return; fi
  say "$1 of $2"
  "$PYTHON" -m bench.run --device "$device" --backend "$2" --only "$1" --no-tests $quick --out "$record" "${@:3}"
}
if wanted measure; then
  measure ceilings "${backends%% *}"
  for entry in solver paper-bf16 overhead growth small sinkhorn survivors; do
    for backend in $backends; do
      [ -n "$quick" ] && [ "$entry" = survivors ] || measure "$entry" "$backend"
    done
  done
fi

if wanted rollouts && [ "$SECONDS" -le "$LIMIT" ]; then
  say "larger rollouts: training, sampling"
  larger="--problem-steps 100 --width 1024 --layers 8 --steps 20000 --minutes 4 --groups 4 --most 64"
  [ -z "$quick" ] || larger="--problem-steps 12 --steps 2 --groups 1 --any-group"
  # shellcheck disable=SC2086
  if "$PYTHON" examples/arithmetic/record.py --device "$device" $larger --out "$BUILD/larger.safetensors"; then
    [ -n "$quick" ] || cp "$BUILD/larger.safetensors" "${record%.json}-larger.safetensors"
    for backend in $backends; do measure survivors "$backend" --rollouts "$BUILD/larger.safetensors"; done
  else
    echo "no larger rollouts: see above"
  fi
fi

if wanted profile && [ "$gpu" = 1 ] && command -v ncu >/dev/null && [ "$SECONDS" -le "$LIMIT" ]; then
  say "profile of the kernels of $backends"
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
    timeout 90 ncu --clock-control none -k 'regex:sinkhorn|solve|token_cost|reduce_costs' --launch-count 12 \
      --section SpeedOfLight --section WarpStateStats --section SchedulerStats --section Occupancy \
      env PYTHONPATH="$PWD:$PYTHONPATH" "$PYTHON" "$BUILD/one_call.py" "$backend" >"${record%.json}-$backend-ncu.txt" || echo "ncu: no profile of $backend"
  done
fi

if [ -f "$record" ]; then
  say "what was measured"
  "$PYTHON" -m bench.gpu "$record"
fi
[ -z "$failed" ] || fail "not clean, or out of time, under compute-sanitizer:$failed"
