#!/bin/sh
# What only a GPU can measure, the shortest first. Each part that has ended is left out when the script is started again,
# and the students of Table 2 resume, so the script may be stopped at any time:
#
#     sh benchmarks/gpu.sh OUT            # on an NVIDIA GPU; CIFAR-100 below $REFILLED_DATA for the last part
#     DEVICE=cpu sh benchmarks/gpu.sh OUT # does it run? The steps alone, one round
set -eu
out=$1
device=${DEVICE:-cuda}
here=$(dirname "$0")
python=${PYTHON:-$here/../.venv/bin/python}
mkdir -p "$out"

part() { # part NAME COMMAND ...: its output in OUT/NAME.md, if it is not there yet
    name=$1
    shift
    if [ -e "$out/$name.md" ]; then
        return
    fi
    echo "$name: $*"
    "$@" >"$out/$name.part"
    mv "$out/$name.part" "$out/$name.md"
}

rounds=50
if [ "$device" = cpu ]; then
    rounds=1
fi
step() {
    "$python" "$here/step.py" --device "$device" --rounds "$rounds" "$@"
}

if [ "$device" = cuda ]; then
    part device nvidia-smi
fi
part step-32 step --students wrn_16_1
part step-224-resnet50 step --image-size 224 --batch-size 32 --students timm/mobilenetv3_small_050 \
    --teacher timm/resnet50 --methods kd regression
part step-224-dinov2 step --image-size 224 --batch-size 32 --students timm/mobilenetv3_small_050 \
    --teacher timm/vit_small_patch14_dinov2 --methods regression
if [ "$device" = cpu ]; then
    exit
fi

# The paper's own scale: all rows of Table 2 for the students (16, 1) and (16, 2), as many at a time as the GPU likes.
"$python" -m refilled reproduce table2 --scale paper --recipe crd240 --only '/(16, 1)' --only '/(16, 2)' \
    --seeds "${SEEDS:-3}" --jobs "${JOBS:-16}" --device "$device" --out "$out/reproduce"
