# Sourced by a job: tells memjax of the other hosts of its slices (memjax/distributed.py); on a single host it sets nothing.
# GKE says it in variables, a Cloud TPU VM in its metadata; read as JAX's own cluster detection reads them.
tpu_attribute() {
  curl -sf --retry 5 -H 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
tpu_value() {
  printenv "$1" || tpu_attribute tpu-env | sed -n "s/^$1: *'\{0,1\}\([^']*\)'\{0,1\}\$/\1/p"
}
if [ -n "${TPU_WORKER_HOSTNAMES:-}" ]; then
  hosts=$TPU_WORKER_HOSTNAMES worker=$TPU_WORKER_ID
else
  hosts=$(tpu_attribute worker-network-endpoints) worker=$(tpu_attribute agent-worker-number)
fi
# Each is a name, or name:id:address.
hosts=$(tr , '\n' <<< "$hosts" | sed 's/.*://')
each=$(wc -l <<< "$hosts")
first=$(tpu_value MEGASCALE_COORDINATOR_ADDRESS) slices=$(tpu_value MEGASCALE_NUM_SLICES) slice=$(tpu_value MEGASCALE_SLICE_ID)
first=${first%%:*}
if [ $((each * ${slices:-1})) -gt 1 ]; then
  export MEMJAX_COORDINATOR="${first:-$(head -n 1 <<< "$hosts")}:8476"
  export MEMJAX_PROCESSES=$((each * ${slices:-1})) MEMJAX_PROCESS=$((${slice:-0} * each + worker))
fi
