"""Ids depend on content and on nothing else."""

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest

from memjax import ids
from memjax.errors import ConfigError, WeightsError


def test_tensor_hash_is_the_hash_of_the_little_endian_c_order_bytes():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = hashlib.sha256(array.astype("<f4").tobytes()).hexdigest()
    assert ids.tensor_hash(array) == expected
    assert ids.tensor_hash(np.asfortranarray(array)) == expected
    assert ids.tensor_hash(array.astype(">f4")) == expected
    assert ids.tensor_hash(array.T) != expected
    assert ids.tensor_hash(np.float32(3.0)) == hashlib.sha256(np.float32(3).tobytes()).hexdigest()
    assert ids.tensor_hash(np.zeros((0, 3))) == hashlib.sha256(b"").hexdigest()
    half = array.astype(ml_dtypes.bfloat16)
    assert ids.tensor_hash(half) == hashlib.sha256(half.tobytes()).hexdigest()


def test_base_id_ignores_order_and_laziness():
    tensors = {"b": np.ones((2, 2), np.float32), "a": np.zeros(3, np.float32)}
    assert ids.base_id(tensors) == ids.base_id(dict(reversed(tensors.items())))
    assert ids.base_id(tensors) == ids.base_id((name, tensors[name]) for name in ("b", "a"))


@pytest.mark.parametrize(
    "changed",
    [
        {"a": np.zeros(4, np.float32)},
        {"a": np.zeros((4, 1), np.float32)},
        {"a": np.zeros(2, np.float64)},
        {"A": np.zeros((2, 2), np.float32)},
        {"a": np.array([[0, 0], [0, 1e-45]], np.float32)},
    ],
    ids=["shape", "rank", "dtype of equal bytes", "name", "smallest value"],
)
def test_base_id_sees_every_change(changed):
    assert ids.base_id(changed) != ids.base_id({"a": np.zeros((2, 2), np.float32)})


def test_base_id_refuses_nothing_and_duplicates():
    with pytest.raises(WeightsError, match="'a' appears twice"):
        ids.base_id([("a", np.zeros(1)), ("a", np.zeros(1))])
    with pytest.raises(WeightsError, match="without tensors"):
        ids.base_id({})


def test_memory_key_and_id_depend_on_each_part_but_not_on_dict_order():
    parts = ["base", "tokenizer", "template", {"steps": 40, "rank": 8}, "source"]
    key = ids.memory_key(*parts)
    assert key == ids.memory_key("base", "tokenizer", "template", {"rank": np.int64(8), "steps": 40}, "source")
    changed = ["x", "x", "x", {"steps": 41, "rank": 8}, "x"]
    others = {ids.memory_key(*[*parts[:i], new, *parts[i + 1 :]]) for i, new in enumerate(changed)}
    assert len(others | {key}) == 6
    assert ids.memory_key("ab", "c", "", {}, "") != ids.memory_key("a", "bc", "", {}, "")
    assert len({ids.memory_id(key, "1"), ids.memory_id(key, "2"), ids.memory_id("k", "1")}) == 3


def test_canonical_json_has_one_spelling_and_refuses_what_is_not_json():
    assert ids.canonical_json({"b": (1, 2), "a": "é"}) == '{"a":"\\u00e9","b":[1,2]}'
    for bad in ({"lr": float("nan")}, {"x": object()}, {"x": np.zeros(2)}):
        with pytest.raises(ConfigError):
            ids.canonical_json(bad)
    assert json.loads(ids.canonical_json({"lr": np.float32(0.5)})) == {"lr": 0.5}


def test_file_and_text_hash(tmp_path):
    path = tmp_path / "x"
    path.write_bytes("naïve\r\n".encode())
    assert ids.file_hash(path) == ids.text_hash("naïve\r\n") == hashlib.sha256("naïve\r\n".encode()).hexdigest()
    assert ids.text_hash("a\n") != ids.text_hash("a\r\n")
