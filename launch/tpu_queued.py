"""Runs memjax on a Cloud TPU slice: asks for a queued resource, ships the code, runs it on all workers, deletes it again.

The resource is deleted whatever happens: the run's end, a failure, Ctrl-C, a lost slice. A lost slice (SUSPENDED,
workers out of reach, a run told to stop) is asked for anew up to --retries times, and training goes on from its newest
complete checkpoint; for that, checkpoints must lie in a bucket (--bucket), since a slice's disks are lost with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from launch import common, queued_commands, ship, tpus
from launch.common import COMMAND_FAILED, DONE, LOST, NOT_DELETED, NOT_GRANTED, LaunchError, say
from launch.processes import Child, Result, Stopped, call, shielded, stoppable
from launch.queued_commands import Queued

# States of a queued resource; in all others it is on its way (cloud.google.com/tpu/docs/queued-resources).
TAKEN = frozenset({"SUSPENDING", "SUSPENDED", "FAILED"})
DELETED = frozenset({"DELETING", "MISSING"})
TRIES = 5  # of a command that fails for reasons of the network
SHOWN_AGAIN = 20  # lines of each worker that a second connection repeats, see worker_run.sh
UNREACHABLE = 255  # ssh's own exit code
KILLED = 137  # SIGKILL
HOST_LOST = 75  # memjax misses another host
TOLD_TO_STOP = 143  # SIGTERM: memjax has saved and said so
_LOGGED = re.compile(r"^\[([^\]\s]+)\] ")
_ENDED = re.compile(r"^memjax-launch: (\S+) ended with (\d+)$")
_CUT_OFF = re.compile(r"[Ee]xecution on worker (\S+) failed with (?:exit status|return code) 255\b")


class Lost(Exception):
    """The slice is no longer there, or not to be reached: a new one may do."""


class Launcher:
    """One run: the resource's life, seen from here."""

    def __init__(self, run: Queued, secret: dict[str, str]) -> None:
        self.run, self.secret = run, secret
        self.exists = False  # whether there may be something to delete

    def launch(self) -> int:
        """0 when the command ended well on all workers; LaunchError otherwise. Nothing is left behind."""
        try:
            for retry in range(1, self.run.retries + 2):
                try:
                    self._attempt()
                    return DONE
                except Lost as lost:
                    if retry > self.run.retries:
                        raise LaunchError(
                            f"{self.run.name}: {lost}, and no retry is left; start it again, with more --retries", LOST
                        ) from None
                    say(f"{self.run.name}: {lost}; asking for a new slice, retry {retry} of {self.run.retries}")
                    self._delete()
                    self.run = queued_commands.again(self.run)
        finally:
            if self.exists:
                with contextlib.suppress(Stopped):  # it ends anyway, with what it has to tell
                    self._delete()
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _attempt(self) -> None:
        self._create()
        self._wait_until_active()
        self._ship()
        try:
            self._follow()
        except LaunchError:
            self._collect(wanted=False)
            raise
        self._collect(wanted=True)

    def _create(self) -> None:
        run = self.run
        with shielded(f"asking for {run.name}"):  # what was asked for must be known, or it could not be deleted
            done = call(queued_commands.create(run))
            self.exists = done.code == 0 or not _refused(done)
        if done.code:
            raise _not_created(run, done)
        say(f"{run.name}: asked for {run.slices} x {run.tpu.accelerator_type} in {run.zone}")

    def _state(self) -> tuple[str, str]:
        """(state, what the service says about it); UNKNOWN where it could not be asked, MISSING where nothing is there."""
        done = call(queued_commands.describe(self.run))
        if done.code:
            return ("MISSING" if "NOT_FOUND" in done.err else "UNKNOWN"), done.error
        try:
            state = json.loads(done.out)["state"]
            detail = state.get("failedData", {}).get("error", {}).get("message", "")
            return state["state"], detail
        except (ValueError, KeyError, TypeError, AttributeError):
            return "UNKNOWN", "gcloud answered something else than a queued resource"

    def _wait_until_active(self) -> None:
        run, shown, unknown = self.run, "", 0
        while True:
            state, detail = self._state()
            if state != shown:
                say(f"{run.name}: {state}")
                shown = state
            unknown = unknown + 1 if state == "UNKNOWN" else 0
            if state == "ACTIVE":
                return
            if state == "FAILED":
                raise LaunchError(
                    f"{run.name}: FAILED before it began ({detail or 'no reason given'}); choose another --zone or --tpu, "
                    "or a longer --wait",
                    NOT_GRANTED,
                )
            if state in TAKEN:
                raise Lost(f"{state} before it began")
            if state in DELETED:
                raise LaunchError(f"{run.name}: {state}, somebody else deleted it; start it again", LOST)
            if unknown >= TRIES:
                raise LaunchError(f"{run.name}: its state cannot be read ({detail}); check: gcloud auth list", NOT_GRANTED)
            time.sleep(run.poll)

    def _ship(self) -> None:
        run = self.run
        files, others = ship.code_files()
        if others:
            say(f"{others} files that git does not track are not shipped; git add what the run needs")
        with tempfile.TemporaryDirectory() as scratch:
            tarball = Path(scratch) / run.tarball
            ship.write_tarball(tarball, ship.job_script(run.command, queued_commands.job_env(run, self.secret)))
            say(f"{run.name}: copying {len(files)} files to all workers")
            self._on_workers(queued_commands.copy(run, str(tarball)), "copying the code")
        say(f"{run.name}: setting up all workers")
        self._on_workers(queued_commands.unpack(run), "setting up")

    def _on_workers(self, command: Sequence[str], what: str) -> None:
        """A command that may be repeated: tried again while the slice is there but not to be reached."""
        for _ in range(TRIES):
            done = call(command)
            if done.code == 0:
                return
            self._check_there()
            if done.code != UNREACHABLE:
                break
            time.sleep(self.run.poll)
        else:
            raise Lost(f"workers cannot be reached for {what} ({done.error})")
        said = self._into() / "setup.log"
        said.write_text(done.out + done.err, "utf-8")
        raise LaunchError(f"{self.run.name}: {what} failed on the workers ({done.error}); read {said}", COMMAND_FAILED)

    def _into(self) -> Path:
        folder = Path(self.run.into)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _check_there(self) -> None:
        """Raises Lost when the slice is gone."""
        state, _ = self._state()
        if state in TAKEN:
            raise Lost(f"{state} (taken away)")
        if state in DELETED:
            raise LaunchError(f"{self.run.name}: {state}, somebody else deleted it; start it again", LOST)

    def _follow(self) -> None:
        """Shows the logs until the command has ended well on all workers; Lost or LaunchError otherwise."""
        run = self.run
        path = self._into() / "run.log"
        say(f"{run.name}: running; the log is {path}")
        with open(path, "a", encoding="utf-8") as log:
            tries = TRIES
            while tries:
                ended, cut_off, news, code = self._attach(log)
                if code == 0:
                    return
                self._check_there()
                failed = {host: how for host, how in ended.items() if how}
                if failed and not cut_off:
                    if TOLD_TO_STOP in failed.values():
                        raise Lost("the run was told to stop")
                    failed = {host: how for host, how in failed.items() if how != HOST_LOST}
                    if not failed:
                        raise Lost("the hosts miss one of them")
                    # The first to end is the likely cause; the others end because they miss it.
                    host, how = next(iter(failed.items()))
                    why = " (killed, often for want of memory)" if how == KILLED else ""
                    raise LaunchError(f"{run.name}: worker {host} ended with {how}{why}; read {path}", COMMAND_FAILED)
                say(f"{run.name}: lost the connection to {_named(cut_off)}; connecting again")
                tries = TRIES if news else tries - 1
                time.sleep(run.poll)
        raise Lost(f"{_named(cut_off)} cannot be reached")

    def _attach(self, log: TextIO) -> tuple[dict[str, int], list[str], bool, int]:
        """({host: how its command ended}, workers whose connection broke, whether the log had news, gcloud's exit code)."""
        ended: dict[str, int] = {}
        cut_off: list[str] = []
        shown: Counter[str] = Counter()

        def on_line(line: str) -> None:
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()
            if found := _LOGGED.match(line):
                shown[found[1]] += 1
            elif found := _ENDED.match(line):
                ended[found[1]] = int(found[2])
            elif found := _CUT_OFF.search(line):
                cut_off.append(found[1])

        child = Child(queued_commands.follow(self.run), on_line)
        try:
            while (code := child.wait(self.run.poll)) is None:
                self._check_there()
        finally:
            child.end()
        return ended, cut_off, max(shown.values(), default=0) > SHOWN_AGAIN, code

    def _collect(self, *, wanted: bool) -> None:
        """Copies what was asked for; after a failure (not wanted) as far as it can be had."""
        for path in self.run.collect:
            for _ in range(TRIES if wanted else 1):
                done = call(queued_commands.collect(self.run, path))
                if done.code == 0:
                    say(f"{self.run.name}: copied {path} to {self.run.into}")
                    break
                if wanted:
                    time.sleep(self.run.poll)
            else:
                line = f"{self.run.name}: {path} could not be copied ({done.error}); with --bucket it would be kept there"
                if wanted:
                    raise LaunchError(line, COMMAND_FAILED)
                say(line)

    def _delete(self) -> None:
        run = self.run
        command = queued_commands.delete(run)
        with shielded(f"deleting {run.name}"):
            say(f"{run.name}: deleting")
            for _ in range(TRIES):
                done = call(command)
                if done.code == 0 or "NOT_FOUND" in done.err:
                    self.exists = False
                    return
                time.sleep(run.poll)
            raise LaunchError(
                f"{run.name} could not be deleted and may still cost money ({done.error}); run: {shlex.join(command)}",
                NOT_DELETED,
            )


def _named(workers: Sequence[str]) -> str:
    return f"worker {', '.join(workers)}" if workers else "the workers"


_REFUSED = ("ALREADY_EXISTS", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "INVALID_ARGUMENT", "active account")


def _refused(done: Result) -> bool:
    """Whether a failed `create` surely made nothing. Where that is unclear the resource is deleted, if it is there."""
    return done.code == 2 or "quota" in done.err.lower() or any(word in done.err for word in _REFUSED)


def _not_created(run: Queued, done: Result) -> LaunchError:
    what, where = run.tpu.accelerator_type, run.zone
    if "ALREADY_EXISTS" in done.err:
        delete = shlex.join(queued_commands.delete(run))
        return LaunchError(f"{run.name} is there already, in {where}; choose another --name, or delete it: {delete}")
    if "RESOURCE_EXHAUSTED" in done.err or "quota" in done.err.lower():
        return LaunchError(
            f"{run.name}: no quota for {what} in {where} ({done.error}); ask for it in the console under IAM, Quotas, or "
            "choose another --zone or --tpu",
            NOT_GRANTED,
        )
    if "PERMISSION_DENIED" in done.err or "active account" in done.err:
        return LaunchError(
            f"{run.name}: not allowed ({done.error}); run gcloud auth login, and see that you are TPU Admin in the project",
            NOT_GRANTED,
        )
    if "INVALID_ARGUMENT" in done.err or done.code == 2:
        return LaunchError(f"{run.name}: gcloud refuses the request ({done.error}); see --tpu, --zone and --runtime")
    return LaunchError(f"{run.name}: could not ask for {what} in {where} ({done.error}); try again", NOT_GRANTED)


def commands(run: Queued) -> list[list[str]]:
    """What a run without mishaps calls, in order."""
    return [
        queued_commands.create(run),
        queued_commands.describe(run),
        queued_commands.copy(run, run.tarball),
        queued_commands.unpack(run),
        queued_commands.follow(run),
        *(queued_commands.collect(run, path) for path in run.collect),
        queued_commands.delete(run),
    ]


def _parser() -> argparse.ArgumentParser:
    made = common.parser(
        "tpu_queued",
        "Run memjax on a Cloud TPU slice: create a queued resource, run on all its workers, collect, delete.",
        "python -m launch.tpu_queued --name tiny --zone us-west4-a --tpu v5e-16 --spot --retries 5 --bucket my-bucket \\\n"
        "    -- train base configs/tiny_base.yaml --out bucket/tiny",
    )
    made.add_argument("--name", required=True, help="the resource's name")
    made.add_argument("--zone", required=True, help="the zone, as in us-west4-a")
    made.add_argument("--tpu", required=True, help="the slice: v5e-16, v6e-8, v5p-64, v4-32, or a shape: v5p-4x4x12")
    made.add_argument("--project", default="", help="gcloud's own by default")
    made.add_argument("--slices", type=int, default=1, help="slices of that size")
    made.add_argument("--runtime", default="", help="the TPU software version, if not the usual one of the generation")
    made.add_argument("--spot", action="store_true", help="cheaper, and may be taken away at any time")
    made.add_argument("--reserved", action="store_true", help="out of the project's reservation")
    made.add_argument("--wait", default="", metavar="DURATION", help="give up if not granted after so long, as in 6h")
    made.add_argument("--bucket", default="", help="a Cloud Storage bucket, mounted as bucket/ beside the code")
    made.add_argument(
        "--collect", action="append", default=[], metavar="PATH", help="copy this back at the end; repeatable"
    )
    made.add_argument("--into", default="", metavar="DIR", help="where to, beside the log; runs/NAME by default")
    made.add_argument(
        "--retries", type=int, default=0, help="new slices after lost ones; training goes on where it was saved"
    )
    made.add_argument("--poll", type=float, default=20.0, metavar="SECONDS", help="between two looks at the state; 20")
    made.add_argument("--internal-ip", action="store_true", help="workers without public addresses")
    made.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable of the run; no secrets")
    made.add_argument("--env-file", metavar="FILE", help="variables of the run, secrets too: NAME=VALUE lines")
    made.add_argument(
        "--create-arg", action="append", default=[], metavar="ARG", help="handed to gcloud: --create-arg=--network=mine"
    )
    return made


def launch(argv: Sequence[str]) -> int:
    """Runs it; the exit codes are in --help."""
    own, command = common.split_command(argv)
    options = _parser().parse_args(own)
    common.require_command(command)
    shown = common.variables(options.env)
    secret = common.read_env_file(options.env_file) if options.env_file else {}
    run = Queued(
        name=common.check_name(options.name),
        zone=options.zone,
        tpu=tpus.parse(options.tpu),
        command=command,
        project=options.project,
        slices=options.slices,
        runtime=options.runtime,
        spot=options.spot,
        reserved=options.reserved,
        wait=options.wait,
        bucket=options.bucket,
        collect=tuple(options.collect),
        into=options.into or f"runs/{options.name}",
        retries=options.retries,
        poll=options.poll,
        internal_ip=options.internal_ip,
        create_args=tuple(options.create_arg),
        env=tuple(shown.items()),
    )
    if run.retries and not run.bucket:
        say("--retries without --bucket: the disks of a lost slice are lost too, and training begins anew")
    if options.dry_run:
        hidden = dict.fromkeys(secret, f"(from {options.env_file})")
        print(f"# {run.tarball}: the files that git tracks, and job.sh:")
        for line in ship.job_script(run.command, queued_commands.job_env(run, hidden)).splitlines():
            print(f"#   {line}")
        common.show(commands(run))
        return DONE
    try:
        with stoppable():
            return Launcher(run, secret).launch()
    except Stopped as stopped:
        say(f"{run.name}: stopped, and deleted what was created")
        return 128 + stopped.number


if __name__ == "__main__":
    sys.exit(common.finish(launch))
