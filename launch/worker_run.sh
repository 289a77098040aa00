#!/usr/bin/env bash
# On a TPU worker: starts job.sh in the background unless it was started, then shows its log until it ends, each line with
# this host's name. A broken connection does not end the run; calling this again shows how it goes on.
cd "$(dirname "$0")/../.." || exit 2
from=20
if mkdir started 2> /dev/null; then
  from=+1
  # Before the job is in the background, where it would come too late for tail now and then.
  : > run.log
  setsid nohup bash -c 'bash job.sh; echo $? > code.tmp; mv code.tmp exit_code' > run.log 2>&1 < /dev/null &
  echo $! > pid
fi
tail -n "$from" -s 0.2 -f --pid="$(cat pid)" run.log | sed -u "s/^/[$(hostname)] /"
# A job that was killed could not say how it ended.
code=$(cat exit_code 2> /dev/null || echo 137)
echo "memjax-launch: $(hostname) ended with $code"
exit "$code"
