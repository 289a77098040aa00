"""What a compiled program does, read from its text: multiplications, bytes to and from HBM, and what chips exchange.

The compiler's own cost analysis counts the body of a loop once, and a layer is the body of a loop; and it counts what
stays in a chip's fast memory as it counts HBM. Here a loop counts as often as it runs (once, where that depends on data),
only buffers in HBM count, and a Pallas kernel moves and multiplies what it says of itself. Everything is per device, and
an estimate: it says what is moved, not how fast.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SHAPE = re.compile(r"(pred|bf16|f8\w*|[fsuc]\d+|token)\[([\d,]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
# Of these nothing is moved: they name, or are counted elsewhere.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id iota "
    "opt-barrier add-dependency domain".split()
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind: how often they run, bytes of their results, and bytes that a device sends for them.

    sent: of the usual ring algorithms; (n - 1)/n of what is gathered or scattered among n, twice that for an all-reduce.
    """

    kind: str
    count: int
    bytes: float
    sent: float


@dataclasses.dataclass(frozen=True)
class Work:
    """What a device does in one run of a program; flops of matrix products only, and of kernels."""

    flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]

    @property
    def sent(self) -> float:
        """Bytes that a device sends to others."""
        return sum(one.sent for one in self.collectives)


@dataclasses.dataclass(frozen=True)
class _Op:
    name: str
    shape: str
    code: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute such as body= names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class _Computation:
    ops: dict[str, _Op]

    def root(self) -> _Op:
        return next((op for op in self.ops.values() if op.root), next(reversed(self.ops.values())))

    def parameters(self) -> dict[int, str]:
        return {int(op.rest.split(")")[0]): op.name for op in self.ops.values() if op.code == "parameter"}


@dataclasses.dataclass
class _Sum:
    flops: float = 0.0
    hbm: float = 0.0
    found: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def add(self, other: _Sum, times: int = 1) -> None:
        self.flops += times * other.flops
        self.hbm += times * other.hbm
        for kind, numbers in other.found.items():
            mine = self.found.setdefault(kind, [0.0, 0.0, 0.0])
            self.found[kind] = [a + times * b for a, b in zip(mine, numbers, strict=True)]


def read_work(text: str, *, loops: bool = True) -> Work:
    """The work of an optimised HLO module's text, per device; loops=False counts every loop body once, as XLA does."""
    module = _parse(text)
    total = _work(module, module["ENTRY"], _devices(text), loops)
    kinds = [Collective(kind, int(n), size, sent) for kind, (n, size, sent) in sorted(total.found.items())]
    return Work(total.flops, total.hbm, tuple(kinds))


def _devices(text: str) -> int:
    header = text.split("\n", 1)[0]
    counts = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)]
    return math.prod(counts) if counts else 1


def _parse(text: str) -> dict[str, _Computation]:
    module: dict[str, _Computation] = {}
    ops: dict[str, _Op] | None = None
    name, entry = "", False
    for line in text.split("\n"):
        if ops is None:
            if found := _COMPUTATION.match(line):
                entry, name, ops = bool(found[1]), found[2], {}
        elif line.startswith("}"):
            module[name] = _Computation(ops)
            if entry:
                module["ENTRY"] = module[name]
            ops = None
        elif found := _INSTRUCTION.match(line):
            op = _instruction(found[2], found[3], bool(found[1]))
            ops[op.name] = op
    return module


def _instruction(name: str, text: str, root: bool) -> _Op:
    shape_end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, rest = text[:shape_end], text[shape_end:].lstrip()
    code, _, rest = rest.partition("(")
    end = _closing("(" + rest, 0) - 1
    operands = tuple(_NAME.findall(rest[: end - 1] if end else rest))
    return _Op(name, shape, code.strip(), operands, rest, root)


def _closing(text: str, begin: int) -> int:
    """The place behind the bracket that closes the one at `begin`."""
    depth = 0
    for place in range(begin, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place + 1
    return len(text)


def _arrays(shape: str) -> Iterator[tuple[float, list[int], bool]]:
    """(bytes, dimensions, whether it lies in HBM) of each array in a shape's text."""
    for kind, sizes, layout in _SHAPE.findall(shape):
        if kind == "token":
            continue
        dimensions = [int(n) for n in sizes.split(",") if n]
        digits = re.search(r"\d+", kind)
        bits = 8 if kind == "pred" else int(digits[0]) if digits else 32
        elsewhere = re.search(r"S\((\d+)\)", layout or "")
        yield math.prod(dimensions) * bits / 8, dimensions, elsewhere is None or elsewhere[1] == "0"


def _bytes(shape: str, *, hbm: bool = False) -> float:
    return sum(size for size, _, held in _arrays(shape) if held or not hbm)


def _work(module: Mapping[str, _Computation], computation: _Computation, devices: int, loops: bool) -> _Sum:
    """The work of a computation that runs once, with what it calls."""
    total = _Sum()
    seen: set[str] = set()
    for op in computation.ops.values():
        kind = op.code.removesuffix("-start")
        if op.code == "while":
            body, condition = module[op.attribute("body") or ""], module[op.attribute("condition") or ""]
            times = _trips(computation, op, body, condition) if loops else 1
            total.add(_work(module, body, devices, loops), times)
            continue
        if op.code == "conditional":
            branches = [module[name] for name in _branches(op)]
            parts = [_work(module, branch, devices, loops) for branch in branches]
            if parts:  # the dearest is taken: which one runs depends on data
                total.add(max(parts, key=lambda part: (part.flops, part.hbm)))
            continue
        if op.code == "call" and (called := op.attribute("to_apply")):
            total.add(_work(module, module[called], devices, loops))
            continue
        if kind in COLLECTIVES:
            _add_collective(total, computation, op, kind, devices)
        total.flops += _flops(computation, op)
        called = op.attribute("calls")
        if called and called in module:
            inner = _inside(module, module[called], devices, seen)
            if not _passed_on(op):  # else its operands are not counted as the call's
                inner.hbm = 0.0
            total.add(inner)
        total.hbm += _moved(module, computation, op)
    return total


def _inside(module: Mapping[str, _Computation], fused: _Computation, devices: int, seen: set[str]) -> _Sum:
    """Multiplications and collectives of a fusion or an asynchronous call; its bytes are those of the call.

    seen: the channels counted already. An asynchronous collective stands in the fusion that starts it, in all that compute
    while it is under way, and in the one that ends it, each time with its one channel.
    """
    total = _Sum()
    for op in fused.ops.values():
        kind = op.code.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = re.search(r"channel_id=(\d+)", op.rest)
            if channel is None or channel[1] not in seen:
                _add_collective(total, fused, op, kind, devices)
                held = [fused.ops[name].shape for name in op.operands if name in fused.ops]
                total.hbm += sum(_bytes(shape, hbm=True) for shape in held) if channel else 0.0
            if channel is not None:
                seen.add(channel[1])
        total.flops += _flops(fused, op)
        if (called := op.attribute("calls")) and called in module:
            total.add(_inside(module, module[called], devices, seen))
    return total


def _branches(op: _Op) -> list[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", op.rest):
        return [name.strip().lstrip("%") for name in found[1].split(",")]
    return [name for key in ("true_computation", "false_computation") if (name := op.attribute(key))]


def _trips(outer: _Computation, loop: _Op, body: _Computation, condition: _Computation) -> int:
    """How often a loop runs that counts up by one to a constant; 1 where that is not what it does."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    test = condition.root()
    if test.code != "compare" or "direction=LT" not in test.rest or len(test.operands) != 2:
        return 1
    counter, limit = (condition.ops[name] for name in test.operands)
    if counter.code != "get-tuple-element":
        return 1
    start = _carried(outer, loop, _index(counter))
    stop = limit if limit.code == "constant" else None
    if limit.code == "get-tuple-element":
        stop = _carried(outer, loop, _index(limit))
    first, last = (_constant(op) for op in (start, stop))
    return max(last - first, 1) if first is not None and last is not None else 1


def _index(op: _Op) -> int:
    found = re.search(r"index=(\d+)", op.rest)
    return int(found[1]) if found else 0


def _carried(outer: _Computation, loop: _Op, index: int) -> _Op | None:
    """What a loop begins with in a place of its tuple, seen through copies."""
    begin = outer.ops.get(loop.operands[0])
    if begin is None or begin.code != "tuple" or index >= len(begin.operands):
        return None
    op = outer.ops.get(begin.operands[index])
    while op is not None and op.code in ("copy", "bitcast", "copy-done", "copy-start"):
        op = outer.ops.get(op.operands[0])
    return op


def _constant(op: _Op | None) -> int | None:
    found = re.match(r"(-?\d+)\)", op.rest) if op is not None and op.code == "constant" else None
    return int(found[1]) if found else None


def _told(op: _Op, what: str) -> float | None:
    """What a Pallas kernel says of itself: `flops` or `bytes_accessed`, from the sizes that it is called with."""
    found = re.search(rf'"cost_estimate":\s*\{{[^}}]*"{what}":\s*"?(\d+)', op.rest) if op.code == "custom-call" else None
    return float(found[1]) if found else None


def _flops(computation: _Computation, op: _Op) -> float:
    """Two for each multiplication of a dot or a convolution, which is what the TPU's compiler makes of dots."""
    if (told := _told(op, "flops")) is not None:
        return told
    if op.code == "dot":
        sizes = _dimensions(computation.ops[op.operands[0]])
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
        along = [int(n) for n in contracted[1].split(",") if n] if contracted else []
        return 2.0 * math.prod(_dimensions(op)) * math.prod(sizes[n] for n in along)
    if op.code != "convolution" or not (labels := re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)):
        return 0.0
    out = _dimensions(op)
    lhs, rhs = (_dimensions(computation.ops[name]) for name in op.operands[:2])
    window = _window(op.rest, sum(c.isdigit() for c in labels[1]))
    positions = 1
    for n, (stride, low, left_dilation, right_dilation) in enumerate(window):
        digit = str(n)
        positions *= _positions(
            out[labels[3].index(digit)],
            rhs[labels[2].index(digit)],
            lhs[labels[1].index(digit)],
            stride,
            low,
            left_dilation,
            right_dilation,
        )
    return 2.0 * positions * out[labels[3].index("b")] * out[labels[3].index("f")] * rhs[labels[2].index("i")]


def _dimensions(op: _Op) -> list[int]:
    return next(_arrays(op.shape), (0.0, [], True))[1]


def _window(rest: str, count: int) -> list[tuple[int, int, int, int]]:
    """(stride, padding before, dilation of the input, dilation of the kernel) of each dimension of a window."""
    found = re.search(r"window=\{([^}]*)\}", rest)
    told = dict(part.split("=") for part in found[1].split()) if found else {}

    def each(name: str, default: str) -> Sequence[str]:
        return told[name].split("x") if name in told else [default] * count

    low = [part.split("_")[0] for part in each("pad", "0_0")]
    columns = (each("stride", "1"), low, each("lhs_dilate", "1"), each("rhs_dilate", "1"))
    return [(int(a), int(b), int(c), int(d)) for a, b, c, d in zip(*columns, strict=True)]


def _positions(out: int, kernel: int, size: int, stride: int, low: int, spread: int, kernel_spread: int) -> int:
    """Pairs of an output and a kernel place that meet a value and not padding: batch dimensions of dots are windows."""
    if kernel == 1 and not low and spread == 1:
        return min(out, -(-size // stride))
    held = 0
    reach = (size - 1) * spread
    for place in range(kernel):
        at = place * kernel_spread - low
        # Outputs o with 0 <= o * stride + at <= reach at a multiple of `spread`.
        first, last = max(0, (stride - 1 - at) // stride), min(out - 1, (reach - at) // stride)
        if spread == 1:
            held += max(0, last - first + 1)
        else:
            held += sum((o * stride + at) % spread == 0 for o in range(first, last + 1))
    return held


def _add_collective(total: _Sum, computation: _Computation, op: _Op, kind: str, devices: int) -> None:
    group = _group(op.rest, devices)
    arrays = [size for size, _, _ in _arrays(op.shape)]
    given = sum(_bytes(computation.ops[name].shape) for name in op.operands if name in computation.ops)
    result = given if kind in ("all-reduce", "all-to-all", "collective-permute") else max(arrays, default=0.0)
    if kind == "all-gather" and not op.code.endswith("-start"):
        result = sum(arrays)
    if kind == "reduce-scatter":
        result = given / max(group, 1)
    share = (group - 1) / group if group else 0.0
    sent = {
        "all-gather": result * share,
        "reduce-scatter": given * share,
        "all-reduce": 2 * given * share,
        "all-to-all": given * share,
        "collective-permute": given,
    }[kind]
    held = total.found.setdefault(kind, [0.0, 0.0, 0.0])
    total.found[kind] = [held[0] + 1, held[1] + result, held[2] + sent]


def _group(rest: str, devices: int) -> int:
    """How many devices take part in each group of a collective."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'?([\w]+)'?=(\d+)", found[1]))
        named = re.findall(r"'?(\w+)'?(?::\((\d+)\)(\d+))?", found[2])
        return math.prod(int(part) if part else int(sizes[name]) for name, _, part in named)
    return devices


def _moved(module: Mapping[str, _Computation], computation: _Computation, op: _Op) -> float:
    """Bytes that an operation reads from HBM and writes to it."""
    if op.code in _FREE or op.code.endswith(("-done", "-update")):
        return 0.0
    if op.code == "copy-start":  # (to, from, context)
        arrays = list(_arrays(op.shape))
        return sum(size for size, _, held in arrays[:2] if held)
    if op.code == "slice-start":  # ((from), to, context), of which the part is read
        (_, _, there), (part, _, kept) = list(_arrays(op.shape))[:2]
        return part * (there + kept)
    fused = module.get(op.attribute("calls") or "") if op.code == "fusion" else None
    passed = _passed_on(op) if fused is not None and _exchanges(fused) else {}
    read = 0.0
    written = sum(size for at, (size, _, held) in enumerate(_arrays(op.shape)) if held and at not in passed)
    for place, name in enumerate(op.operands):
        if place in passed.values():
            continue
        held = _bytes(computation.ops[name].shape, hbm=True) if name in computation.ops else 0.0
        if held and fused is not None:
            held = min(held, _read_of(module, fused, place))
        elif held and op.code in ("dynamic-slice", "gather") and place == 0:
            held = min(held, _bytes(op.shape))
        elif held and op.code in ("dynamic-update-slice", "scatter") and place == 0:
            held = 0.0
        read += held
    if fused is not None and written:
        written = written if passed else min(written, _written_by(module, fused))
    elif op.code in ("dynamic-update-slice", "scatter") and written:
        update = op.operands[1 if op.code == "dynamic-update-slice" else -1]
        written = min(written, _bytes(computation.ops[update].shape))
    if op.code.removesuffix("-start") in COLLECTIVES and op.code.endswith("-start"):
        written /= 2  # the result names its operands too
    told = _told(op, "bytes_accessed")  # a kernel is handed all layers and reads blocks of one
    return read + written if told is None else min(read + written, told)


def _exchanges(fused: _Computation) -> bool:
    """Whether a collective is under way in a fusion."""
    return any(op.code.removesuffix("-start") in COLLECTIVES for op in fused.ops.values())


def _passed_on(op: _Op) -> dict[int, int]:
    """{place in the result: operand} of what an operation hands on as it is."""
    found = re.search(r"output_to_operand_aliasing=\{(.*?\)) *\}", op.rest)
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", found[1]) if found else []
    return {int(place or 0): int(operand) for place, operand in pairs}


def _read_of(module: Mapping[str, _Computation], fused: _Computation, place: int) -> float:
    """Bytes that a fusion reads of a parameter: of one that is only sliced, the slices."""
    name = fused.parameters().get(place)
    whole = _bytes(fused.ops[name].shape) if name else 0.0
    read = 0.0
    waiting = [name] if name else []
    while waiting:
        seen = waiting.pop()
        for op in fused.ops.values():
            if seen not in op.operands:
                continue
            at = op.operands.index(seen)
            if op.code in ("bitcast", "copy", "reshape") and not op.root:
                waiting.append(op.name)
            elif op.code in ("dynamic-slice", "gather", "slice") and at == 0:
                read += _bytes(op.shape)
            elif op.code in ("dynamic-update-slice", "scatter") and at == 0:
                continue
            elif op.code == "fusion" and (inner := module.get(op.attribute("calls") or "")) is not None:
                read += _read_of(module, inner, at)
            else:
                return whole
    return min(read, whole)


def _written_by(module: Mapping[str, _Computation], fused: _Computation) -> float:
    """Bytes that a fusion writes: of a buffer that is updated in place, the update."""

    def of(op: _Op) -> float:
        while op.code in ("bitcast", "copy", "reshape") and op.operands and op.operands[0] in fused.ops:
            before = fused.ops[op.operands[0]]
            if before.code == "parameter":
                break
            op = before
        if op.code == "tuple":
            return sum(of(fused.ops[name]) for name in op.operands)
        if op.code == "dynamic-update-slice":
            return _bytes(fused.ops[op.operands[1]].shape)
        if op.code == "scatter":
            return _bytes(fused.ops[op.operands[-1]].shape)
        if op.code == "fusion" and (inner := module.get(op.attribute("calls") or "")) is not None:
            return _written_by(module, inner)
        return _bytes(op.shape)

    return of(fused.root())
