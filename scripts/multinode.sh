#!/usr/bin/env bash
# Train on several machines: start this on each of them, with the same arguments and its own NODE_RANK.
set -euo pipefail

usage() {
    cat >&2 <<'USAGE'
usage: MASTER_ADDR=HOST NNODES=N NODE_RANK=R [NPROC=P] [MASTER_PORT=29500] [SHARED=yes|no] \
           scripts/multinode.sh RECIPE [key.path=value ...] [--run-folder DIR] [nearfield train's options]

  MASTER_ADDR  a name or address of machine 0 that all machines can reach
  NNODES       how many machines there are
  NODE_RANK    which one this is, from 0 to NNODES - 1
  NPROC        processes on this machine; by default one a GPU, or one where there is none
  MASTER_PORT  a free port of machine 0
  SHARED       yes: all machines see the run's folder, and process 0 builds the data for all (the default)
               no: each machine builds data, tokens and batches itself first; all must come out the same, which is checked.
               Checkpoints and the model are then on machine 0

Spread over machines: training.backend=ddp (the default), fsdp2, zero1, zero2 or zero3.
Example, on the second of two machines:
  MASTER_ADDR=node0 NNODES=2 NODE_RANK=1 scripts/multinode.sh training/recipes/wordnet.yaml training.backend=fsdp2
USAGE
    exit 2
}

refuse() {
    echo "multinode.sh: $1" >&2
    echo >&2
    usage
}

is_number() { [[ $1 =~ ^[0-9]+$ ]]; }

case ${1:-} in "" | -h | --help) usage ;; esac
for name in MASTER_ADDR NNODES NODE_RANK; do
    [[ -n ${!name:-} ]] || refuse "$name is not set"
done
MASTER_PORT=${MASTER_PORT:-29500}
SHARED=${SHARED:-yes}
PYTHON=${PYTHON:-python3}
for name in NNODES NODE_RANK MASTER_PORT; do
    is_number "${!name}" || refuse "$name is no number: ${!name}"
done
((NNODES >= 1)) || refuse "NNODES is $NNODES; at least 1 is wanted"
((NODE_RANK < NNODES)) || refuse "NODE_RANK is $NODE_RANK, and $NNODES machines have the numbers 0 to $((NNODES - 1))"
[[ $SHARED == yes || $SHARED == no ]] || refuse "SHARED is '$SHARED'; yes or no is wanted"
[[ $1 != -* ]] || refuse "the recipe comes first, and this is an option: $1"
[[ -f $1 || -d $1 ]] || refuse "there is no recipe $1"
if [[ -z ${NPROC:-} ]]; then
    NPROC=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || refuse "NPROC is '$NPROC'; a number from 1 is wanted"

# A rank that is asked to stop writes a checkpoint; the launcher must not kill it meanwhile.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

if [[ $SHARED == no ]]; then
    "$PYTHON" -m nearfield train "$@" --until plan
fi
exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$NPROC" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --max-restarts 0 \
    -m nearfield train "$@"
