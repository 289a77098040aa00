"""What several real processes write together is what one writes; each has a part of the base, the first has the bank."""

import numpy as np
import pytest

from memjax.bank.store import open_bank
from memjax.evaluate.world import documents
from tests.train.test_hosts import started

CALL = ["-c", "from memjax.cli.main import main; main()", "write"]


@pytest.fixture(autouse=True)
def mesh(monkeypatch):
    monkeypatch.setenv("MEMJAX_MESH", "1x2x1")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["distill", "compile"])
def test_two_hosts_write_what_one_writes(tmp_path, how):
    for processes in (1, 2):
        for status, text in started(processes, 2, ["-m", "tests.write.hosts_job", how, str(tmp_path / f"{processes}.npz")]):
            assert status == 0, text
    want, got = np.load(tmp_path / "1.npz"), np.load(tmp_path / "2.npz")
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_first_host_has_the_bank_and_tells_the_others_what_it_holds_already(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMJAX_MESH", "2x1x1")  # rows alone are divided: no exchange in every layer of every token
    text = tmp_path / "text.txt"
    text.write_text(documents("validation", 7, 1, 80)[0].text)
    for _ in range(2):  # the second time there is nothing to write, for none of them
        for status, told in started(2, 2, [*CALL, str(text), "--base", "tiny", "--fast", "--bank", str(tmp_path / "bank")]):
            assert status == 0, told
        with open_bank(tmp_path / "bank") as bank:
            assert [entry.name for entry in bank.list()] == ["text"]


@pytest.mark.parametrize(("options", "said"), [([], "--base"), (["--base", "tiny", "--how", "internalize"], "one process")])
def test_what_several_hosts_cannot_write_is_said_at_once(tmp_path, options, said):
    text = tmp_path / "text.txt"
    text.write_text("The harp is tuned with a spoon.")
    for status, told in started(2, 2, [*CALL, str(text), "--bank", str(tmp_path / "bank"), *options]):
        assert status != 0
        assert "memjax: " in told
        assert "Traceback" not in told
    assert said in told
    assert not (tmp_path / "bank").exists()
