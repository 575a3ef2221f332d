#!/usr/bin/env bash
# One Ray node in a container: ray-node head | worker
#   XTOKEN_HEAD       where workers find the head (head:6379)
#   XTOKEN_NODE_GPUS  GPUs that a worker takes: a number, or "all" (1)
#   XTOKEN_GPU_LOCKS  folder that all workers of this machine share (/run/xtoken-gpus)
# Docker hands out GPUs by count without keeping account: every container that asks for one gets the first. So each
# worker sees all of them and claims its own by a file lock, which the kernel gives back however the container ends.
set -euo pipefail

fail() { echo "ray-node: $*" >&2; exit 1; }

claim_gpus() {  # sets CUDA_VISIBLE_DEVICES; the locks stay held by this shell and what it becomes
    local wanted=$1 locks=${XTOKEN_GPU_LOCKS:-/run/xtoken-gpus} index lock
    local -a present=() mine=()
    mapfile -t present < <(nvidia-smi --query-gpu=index --format=csv,noheader)
    [ "${#present[@]}" -gt 0 ] || fail "nvidia-smi finds no GPU here; XTOKEN_NODE_GPUS=0 makes a node without"
    [ "$wanted" = all ] && wanted=${#present[@]}
    mkdir -p "$locks"
    for index in "${present[@]}"; do
        [ "${#mine[@]}" -lt "$wanted" ] || break
        exec {lock}>"$locks/gpu-$index"
        if flock -n "$lock"; then mine+=("$index"); else exec {lock}>&-; fi
    done
    [ "${#mine[@]}" -eq "$wanted" ] || fail "XTOKEN_NODE_GPUS=$wanted, but only ${#mine[@]} of this machine's" \
        "${#present[@]} GPUs are free; start fewer workers, or give each fewer GPUs"
    export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES
    CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${mine[*]}")
}

# Rows never pass through the object store, so it can be small; metrics and the agent need known ports.
common=(--block --disable-usage-stats --metrics-export-port=8080 --dashboard-agent-listen-port=52365
        --object-store-memory="${XTOKEN_OBJECT_STORE:-1000000000}")

case "${1:-}" in
    head)  # no CPUs and no GPUs: the driver lives here, teachers do not
        exec ray start --head --port=6379 --dashboard-host=0.0.0.0 --num-cpus=0 --num-gpus=0 "${common[@]}" ;;
    worker)
        gpus=${XTOKEN_NODE_GPUS:-1}
        [[ "$gpus" =~ ^(all|[0-9]+)$ ]] || fail "XTOKEN_NODE_GPUS=$gpus is neither a number nor 'all'"
        if [ "$gpus" = 0 ]; then CUDA_VISIBLE_DEVICES=; export CUDA_VISIBLE_DEVICES; else claim_gpus "$gpus"; fi
        exec ray start --address="${XTOKEN_HEAD:-head:6379}" "${common[@]}" ;;
    *) fail "usage: ray-node head | worker" ;;
esac
