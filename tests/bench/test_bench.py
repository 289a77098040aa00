"""The measurements, on a shape of no size: that the ratios are of what they say they are."""

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner

from memjax.bench.attention import shared_segment
from memjax.bench.decode import shared_prefix, unused_same_program
from memjax.bench.lora import adapters
from memjax.bench.timing import SMOLLM2_SHAPE, in_turn
from memjax.cli.bench import bench

TINY = dataclasses.replace(SMOLLM2_SHAPE, num_layers=2, width=32, mlp_width=48, num_heads=2, num_kv_heads=1, vocab_size=64)


@pytest.mark.slow
def test_a_shared_prefix_is_counted_once():
    numbers = shared_prefix(TINY, rows=8, prefix=512, times=1)
    keys = 2 * TINY.num_layers * 512 * TINY.num_kv_heads * TINY.head_size * 4
    assert numbers["shared_prefix_bytes/copied"] - numbers["shared_prefix_bytes/shared"] > 7 * keys
    assert numbers["shared_prefix_bytes_ratio"] < 1
    assert numbers["shared_prefix_time_ratio"] == pytest.approx(
        numbers["shared_prefix_seconds/shared"] / numbers["shared_prefix_seconds/copied"]
    )


def test_memory_that_is_not_used_is_no_other_program():
    assert unused_same_program(TINY) == {"unused_same_program": 1.0}


@pytest.mark.slow
def test_every_row_reads_an_adapter_of_its_own():
    numbers = adapters(TINY, rows=2, resident=5, rank=2, held=8, times=1)
    assert {"adapters_2_of_5_ratio", "adapters_2_of_2_ratio", "adapters_5_over_2_ratio"} < set(numbers)
    assert all(np.isfinite(value) and value > 0 for value in numbers.values())


def test_calls_alternate_after_two_of_each():
    made = []
    in_turn({"a": lambda: made.append("a"), "b": lambda: made.append("b")}, 2)
    assert "".join(made) == "aabb" + "abab"


def test_the_command_writes_its_setting(tmp_path):
    told = ["attention", "--rows", "2", "--prefix", "32", "--times", "1", "--json", "--out", str(tmp_path)]
    result = CliRunner().invoke(bench, told, catch_exceptions=False)
    written = json.loads((tmp_path / "result.json").read_text())
    assert json.loads(result.output) == written
    assert written["setting"]["rows"] == 2
    assert set(shared_segment(TINY, 2, 32, 1)) | {"seconds", "setting"} == set(written)
