#!/usr/bin/env bash
# Runs the parts of benchmarks/gpu on a borrowed GPU in four calls: bash benchmarks/gpu/calls.sh 1|2|3|4
# SITE: a folder with onnxruntime-gpu. DEMO: a folder with the demo's *.onnx.data.gz, if the checkout lacks them.
# OUT: where logs and ids are kept. Never run on a GPU yet.
set -x
W=${W:-/tmp/w}; OUT=${OUT:-$W/out}; SITE=${SITE:-$W/site}
mkdir -p "$W" "$OUT"; exec > >(tee "$OUT/call$1.log") 2>&1
export W PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
CODE=$(cd "$(dirname "$0")/../.." && pwd); cd "$CODE" || exit 1
NVIDIA=$(python3 -c 'import nvidia; print(list(nvidia.__path__)[0])')  # CUDA's libraries come with torch
export LD_LIBRARY_PATH=$NVIDIA/cu13/lib:$NVIDIA/cudnn/lib:$LD_LIBRARY_PATH
# torch's environment alone, and with ONNX Runtime for GPUs in front; T is the limit of a part in seconds
plain() { PYTHONPATH=$CODE timeout "${T:-90}" python3 -W ignore -m "$@" 2>&1 | tail -25; }
gpu() { PYTHONPATH=$SITE:$CODE timeout "${T:-90}" python3 -W ignore -m "$@" 2>&1 | tail -25; }
FIRST=benchmarks.gpu.first
case $1 in
1)  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv; nproc
    ln -sfn "$NVIDIA" "$SITE/nvidia"; ldconfig -p | grep -E 'nvinfer|cudnn' | head -3
    (plain $FIRST make; plain $FIRST make_attention) > "$W/make.log" 2>&1 & made=$!
    gpu benchmarks.gpu.parts probe; gpu benchmarks.gpu.parts memory; gpu engine info
    wait $made; cat "$W/make.log"
    T=60 plain $FIRST ids cpu fp32 64
    for precision in fp32 fp16 fp16a; do gpu $FIRST ids cuda $precision 64; done ;;
2)  export SECONDS_EACH=8
    gpu $FIRST engine cuda fp16 1024 2048; T=120 plain $FIRST generate 64 256
    gpu $FIRST engine cuda fp16a 1024 2048 4096; plain $FIRST live 512 2048; gpu $FIRST engine cuda fp16 512 1024 ;;
3)  gpu $FIRST kernels cuda fp16 1024; gpu $FIRST kernels cuda fp16a 1024; gpu benchmarks.gpu.parts kernels
    SECONDS_EACH=8 gpu $FIRST engine cuda fp16 1024 ;;
4)  [ -z "$DEMO" ] || for graph in decoder encoder; do
        gunzip -c "$DEMO/$graph.onnx.data.gz" > engine/assets/demo/$graph.onnx.data; done
    gpu engine verify --backend cuda
    gpu benchmarks.gpu.runs minute "$W/fp16" cuda 4096 ;;
esac
cp "$W"/ids_*.json "$OUT"/ 2>/dev/null; true
