"""Work read from compiled programs: a scan that the TPU's compiler made (scan.hlo.txt), and small ones by hand.

scan.hlo.txt: `lax.scan(lambda x, w: (tanh(x @ w), None), x, w)[0]` of bfloat16 w [8, 1024, 1024] over (-, fsdp, tensor) and
x [512, 1024] over fsdp on a mesh 1x2x4, compiled for v5e:2x4 by libtpu 0.0.42.1, without metadata.
"""

from pathlib import Path

import pytest

from memjax.plan.hlo import read_work

SCAN = (Path(__file__).parent / "scan.hlo.txt").read_text("utf-8")


def program(*lines, count=8, before=""):
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m, num_partitions={count}\n\n{before}ENTRY %main (x: f32[4]) -> f32[4] {{\n{body}\n}}\n"


def test_a_loop_counts_as_often_as_it_runs():
    once, whole = read_work(SCAN, loops=False), read_work(SCAN)
    # 256 rows on each device, times a quarter of the columns.
    assert once.flops == 2 * 256 * 1024 * 256
    assert whole.flops == 8 * once.flops
    gathers = {one.kind: one for one in whole.collectives}
    assert list(gathers) == ["all-gather"]
    assert gathers["all-gather"].count == 16
    weight, rows = 1024 * 256 * 2, 256 * 1024 * 2
    assert gathers["all-gather"].bytes == 8 * (weight + rows)
    assert gathers["all-gather"].sent == 8 * (weight / 2 + rows * 3 / 4)


def test_of_a_stack_that_is_sliced_only_the_slice_is_read():
    layer, whole = 512 * 256 * 2, 8 * 512 * 256 * 2
    once = read_work(SCAN, loops=False).hbm_bytes
    assert layer < once < whole
    assert read_work(SCAN).hbm_bytes >= whole  # each layer once


@pytest.mark.parametrize(
    ("line", "kind", "size", "sent"),
    [
        ("ROOT %r = f32[64] all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}", "all-gather", 256, 192),
        ("ROOT %r = f32[16] all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", "all-reduce", 64, 96),
        ("ROOT %r = f32[4] reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}", "reduce-scatter", 16, 48),
        ("ROOT %r = f32[16] all-to-all(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}", "all-to-all", 64, 48),
        ("ROOT %r = f32[16] collective-permute(%x), source_target_pairs={{0,1}}", "collective-permute", 64, 64),
        ("ROOT %r = f32[16] all-reduce(%x), replica_groups={}, to_apply=%add", "all-reduce", 64, 112),
        ("ROOT %r = (f32[16], f32[64]) all-gather-start(%x), replica_groups=[2,4]<=[8]", "all-gather", 256, 192),
    ],
)
def test_collectives_of_every_kind(line, kind, size, sent):
    (one,) = read_work(program("%x = f32[16]{0} parameter(0)", line)).collectives
    assert (one.kind, one.count, one.bytes, one.sent) == (kind, 1, size, pytest.approx(sent))


def test_a_batch_of_products_written_as_a_convolution():
    # [3, 5, 7] x [3, 7, 2]: the batch is a window of 3 whose places meet one value each.
    lines = (
        "%x = f32[3,5,7]{2,1,0} parameter(0)",
        "%y = f32[3,7,2]{2,1,0} parameter(1)",
        "ROOT %r = f32[3,5,2]{2,1,0} convolution(%x, %y), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
    )
    assert read_work(program(*lines)).flops == 2 * 3 * 5 * 7 * 2
    dot = "ROOT %r = f32[5,2]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    assert read_work(program("%x = f32[5,7] parameter(0)", "%y = f32[7,2] parameter(1)", dot)).flops == 2 * 5 * 7 * 2


def test_a_buffer_that_is_updated_in_place_counts_its_update():
    fused = (
        "%f (p: f32[100,10], u: f32[1,10], i: s32[]) -> f32[100,10] {\n"
        "  %p = f32[100,10]{1,0} parameter(0)\n  %u = f32[1,10]{1,0} parameter(1)\n  %i = s32[] parameter(2)\n"
        "  ROOT %d = f32[100,10]{1,0} dynamic-update-slice(%p, %u, %i, %i)\n}\n\n"
    )
    lines = (
        "%x = f32[100,10]{1,0} parameter(0)",
        "%u = f32[1,10]{1,0} parameter(1)",
        "%i = s32[]{:S(6)} parameter(2)",
        "ROOT %r = f32[100,10]{1,0} fusion(%x, %u, %i), kind=kLoop, calls=%f",
    )
    assert read_work(program(*lines, before=fused)).hbm_bytes == 40 + 40
    fast = [line.replace("f32[1,10]{1,0}", "f32[1,10]{1,0:T(8,128)S(1)}") for line in lines]
    assert read_work(program(*fast, before=fused)).hbm_bytes == 40


def test_a_loop_whose_end_depends_on_data_counts_once():
    before = (
        "%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {\n  %p = (s32[], f32[4]) parameter(0)\n"
        "  %v = f32[4] get-tuple-element(%p), index=1\n  %n = s32[] get-tuple-element(%p), index=0\n"
        "  %s = f32[4] all-reduce(%v), replica_groups={}, to_apply=%add\n  ROOT %t = (s32[], f32[4]) tuple(%n, %s)\n}\n\n"
        "%test (p: (s32[], f32[4])) -> pred[] {\n  %p = (s32[], f32[4]) parameter(0)\n"
        "  %n = s32[] get-tuple-element(%p), index=0\n  %m = s32[] constant(5)\n"
        "  ROOT %c = pred[] compare(%n, %m), direction=LT\n}\n\n"
    )
    lines = (
        "%x = f32[4] parameter(0)",
        "%zero = s32[] constant(0)",
        "%t = (s32[], f32[4]) tuple(%zero, %x)",
        "%w = (s32[], f32[4]) while(%t), condition=%test, body=%body",
        "ROOT %r = f32[4] get-tuple-element(%w), index=1",
    )
    counted = lambda text: read_work(text).collectives[0].count
    text = program(*lines, before=before)
    assert counted(text) == 5
    assert counted(text.replace("%zero = s32[] constant(0)", "%zero = s32[] parameter(1)")) == 1
    assert counted(text.replace("direction=LT", "direction=NE")) == 1


def test_an_asynchronous_collective_counts_once_and_its_buffers_are_only_passed_on():
    gather = "%g = f32[64]{0} all-gather(%p), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}"
    begin = f"%begin (p: f32[16]) -> (f32[16], f32[64]) {{\n  %p = f32[16]{{0}} parameter(0)\n  {gather}\n"
    begin += "  ROOT %t = (f32[16]{0}, f32[64]{0}) custom-call(%g)\n}\n\n"
    during = "%during (p: f32[16], q: f32[64], y: f32[8]) -> (f32[8], f32[16], f32[64]) {\n  %p = f32[16]{0} parameter(0)\n"
    during += f"  %q = f32[64]{{0}} parameter(1)\n  %y = f32[8]{{0}} parameter(2)\n  {gather}\n"
    during += "  %z = f32[8]{0} negate(%y)\n  ROOT %t = (f32[8]{0}, f32[16]{0}, f32[64]{0}) tuple(%z, %p, %g)\n}\n\n"
    lines = [
        "%x = f32[16]{0} parameter(0)",
        "%y = f32[8]{0} parameter(1)",
        "%s = (f32[16]{0}, f32[64]{0}) fusion(%x), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%begin",
        "%p = f32[16]{0} get-tuple-element(%s), index=0",
        "%q = f32[64]{0} get-tuple-element(%s), index=1",
        "ROOT %r = (f32[8]{0}, f32[16]{0}, f32[64]{0}) fusion(%p, %q, %y), kind=kOutput, "
        "output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%during",
    ]
    work = read_work(program(*lines, before=begin + during))
    (one,) = work.collectives
    assert (one.count, one.bytes, one.sent) == (1, 256, 192)
    assert work.hbm_bytes == 64 + 256 + 32 + 32  # shard read, whole written; and y, z


def test_a_slice_that_is_fetched_in_parts_is_read_once():
    lines = ["%x = s8[4000]{0} parameter(0)"]
    for part in range(4):
        told = f"slice={{[{1000 * part}:{1000 * part + 1000}]}}"
        lines.append(f"%p{part} = ((s8[4000]{{0}}), s8[1000]{{0:S(1)}}, s32[]{{:S(2)}}) slice-start(%x), {told}")
        lines.append(f"%d{part} = s8[1000]{{0:S(1)}} slice-done(%p{part})")
    assert read_work(program(*lines, "ROOT %r = s8[1000]{0:S(1)} copy(%d0)")).hbm_bytes == 4000
    there = lines[1].replace("S(1)", "S(0)")
    assert read_work(program(lines[0], there, "ROOT %r = s8[1000]{0} slice-done(%p0)")).hbm_bytes == 2000


def test_a_kernel_moves_what_it_says_of_itself():
    """Of a buffer of all layers that it is handed it reads blocks of one; what is in fast memory is not read from HBM."""
    cost = '"cost_estimate":{"flops":"3000","transcendentals":"7","bytes_accessed":"900","remote_bytes_transferred":"0"}'
    config = f'custom_call_target="tpu_custom_call", backend_config={{"custom_call_config":{{"body":"TUw=",{cost}}}}}'
    call = f"ROOT %r = f32[10]{{0}} custom-call(%x), {config}"
    found = read_work(program("%x = f32[32,100]{1,0} parameter(0)", call))
    assert (found.flops, found.hbm_bytes) == (3000, 900)
    assert read_work(program("%x = f32[32,100]{1,0:S(1)} parameter(0)", call)).hbm_bytes == 40
    other = call.replace("cost_estimate", "other")
    assert read_work(program("%x = f32[32,100]{1,0} parameter(0)", other)).hbm_bytes == 12840
