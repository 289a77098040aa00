#!/usr/bin/env bash
# On a TPU worker: a virtual environment with memjax[tpu], and the bucket mounted where one is named. Safe to call again.
# usage: worker_setup.sh [BUCKET]
set -euo pipefail
cd "$(dirname "$0")/../.."
# The images of TPU VMs may have an older Python than memjax needs; uv brings one.
python3 -m pip install -q --user uv
[ -x venv/bin/python ] || python3 -m uv venv -q --python 3.12 venv
python3 -m uv pip install -q --python venv/bin/python -e './code[tpu]'
if [ -n "${1:-}" ]; then
  if ! command -v gcsfuse > /dev/null; then
    key=/usr/share/keyrings/cloud.google.asc
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" > /dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    sudo apt-get update -q
    sudo apt-get install -q -y gcsfuse
  fi
  mkdir -p code/bucket
  mountpoint -q code/bucket || gcsfuse --implicit-dirs "$1" code/bucket
fi
