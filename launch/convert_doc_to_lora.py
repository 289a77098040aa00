"""Turns a published Doc-to-LoRA checkpoint (a pickle) into a safetensors file, in a process of its own.

    pip install torch safetensors
    python launch/convert_doc_to_lora.py pytorch_model.bin doc_to_lora.safetensors

A pickle can name any function of any installed package, and plain unpickling calls it. This script calls none but those
that rebuild tensors: every other name in the file becomes an empty shell, so that configuration objects are read and thrown
away. That is a fence, not a proof; convert on a machine without secrets, best without a network (`unshare -rn python …`).
memjax itself reads only what comes out: `memjax.write.hypernet.published.read_published`.
"""

from __future__ import annotations

import argparse
import collections
import pickle
import resource
import sys
import types
from typing import Any

WARNING = """
********************************************************************************************************
  WARNING: {path} is a PICKLE. Whoever made it could have hidden code in it. Names other than those that
  rebuild tensors are replaced by empty shells here, but do not open files of people you do not trust.
********************************************************************************************************
"""
_TENSORS = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("torch", "device"),
}
_STORAGES = {"Float", "Half", "BFloat16", "Double", "Long", "Int", "Bool"}


class Shell:
    """Stands for an object that is not made: takes anything and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Ignores what it is given."""

    def __setstate__(self, state: Any) -> None:
        """Ignores what it is given."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignores what it is given."""

    def __hash__(self) -> int:
        return 0

    def __call__(self, *args: Any, **kwargs: Any) -> Shell:
        return self

    def append(self, value: Any) -> None:
        """Ignores what it is given."""

    extend = add = append


class Fenced(pickle.Unpickler):
    """Finds what rebuilds tensors, ordered dicts and dtypes; a shell for any other name."""

    def find_class(self, module: str, name: str) -> Any:
        """The object of this name, or a shell."""
        import torch

        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        plain = module == "torch" and (
            name.removesuffix("Storage") in _STORAGES or isinstance(getattr(torch, name, None), torch.dtype)
        )
        if plain or (module, name) in _TENSORS:
            return super().find_class(module, name)
        print(f"not made: {module}.{name}", file=sys.stderr)
        return type(name, (Shell,), {})


def convert(source: str, target: str) -> int:
    """Writes the tensors of `source` to `target`; how many there were."""
    import torch
    from safetensors.torch import save_file

    fence = types.ModuleType("fence")
    fence.Unpickler, fence.load = Fenced, None
    found = torch.load(source, map_location="cpu", pickle_module=fence, weights_only=False)
    tensors = {str(name): x.detach().contiguous() for name, x in found.items() if isinstance(x, torch.Tensor)}
    if not tensors:
        raise SystemExit(f"{source} holds no tensors by name; it is no checkpoint of Doc-to-LoRA")
    save_file(tensors, target)
    return len(tensors)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the checkpoint, pytorch_model.bin")
    parser.add_argument("target", help="the safetensors file to write")
    given = parser.parse_args()
    if "memjax" in sys.modules:
        raise SystemExit("run this by itself: nothing that holds a memory should open a pickle")
    print(WARNING.format(path=given.source), file=sys.stderr)
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # from here on a user, other than root, starts no process
    print(f"{convert(given.source, given.target)} tensors are in {given.target}")


if __name__ == "__main__":
    main()
