"""What is read from HLO: sizes in tiles, collectives however they are written, loops."""

import pytest

from eqvae_jax.planning.hlo import result_bytes, shapes_in
from eqvae_jax.planning.traffic import Collective, group_size, measure

# As a TPU's compiler writes it: a gather named where it starts, where it is worked at and where it ends; a loop whose
# length only its condition says; a stack of layers of which a turn reads one; what lies on the chip, S(1).
HLO = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[28,128,128]{2,1,0:T(8,128)}, \
f32[3,5]{1,0:T(8,128)})->(f32[28,128,128]{2,1,0:T(8,128)}, /*index=1*/f32[3,5]{1,0:T(8,128)})}, num_partitions=16

%layer (stack: f32[28,128,128], i: s32[]) -> f32[1,128,128] {
  %stack = f32[28,128,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  ROOT %slice.1 = f32[1,128,128]{2,1,0:T(8,128)S(1)} dynamic-slice(%stack, %i, %i, %i), dynamic_slice_sizes={1,128,128}
}

%start (one: f32[1,128,128]) -> f32[1,128,256] {
  %one = f32[1,128,128]{2,1,0:T(8,128)S(1)} parameter(0)
  ROOT %all-gather.1 = f32[1,128,256]{2,1,0:T(8,128)S(1)} all-gather(%one), channel_id=8, replica_groups=mesh['a'=1,\
'b'=2,'c'=8], device_ids=([8,2]T(1,0)) {'b'}, dimensions={2}
}

%end (one: f32[1,128,128]) -> f32[1,128,256] {
  %one.1 = f32[1,128,128]{2,1,0:T(8,128)S(1)} parameter(0)
  ROOT %all-gather.2 = f32[1,128,256]{2,1,0:T(8,128)S(1)} all-gather(%one.1), channel_id=8, replica_groups=mesh['a'=1,\
'b'=2,'c'=8], device_ids=([8,2]T(1,0)) {'b'}, dimensions={2}
}

%body (state: (s32[], f32[28,128,128])) -> (s32[], f32[28,128,128]) {
  %state = (s32[]{:T(128)}, f32[28,128,128]{2,1,0:T(8,128)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%state), index=0
  %layers = f32[28,128,128]{2,1,0:T(8,128)} get-tuple-element(%state), index=1
  %taken = f32[1,128,128]{2,1,0:T(8,128)S(1)} fusion(%layers, %count), kind=kLoop, calls=%layer, \
backend_config={"estimated_cycles":"100"}
  %begun = f32[1,128,256]{2,1,0:T(8,128)S(1)} fusion(%taken), kind=kCustom, calls=%start
  %ended = f32[1,128,256]{2,1,0:T(8,128)S(1)} fusion(%taken), kind=kCustom, calls=%end
  ROOT %next = (s32[]{:T(128)}, f32[28,128,128]{2,1,0:T(8,128)}) tuple(%count, %layers)
}

%condition (state.1: (s32[], f32[28,128,128])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[28,128,128]{2,1,0:T(8,128)}) parameter(0)
  %bound = s32[]{:T(128)} constant(28)
  %count.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %more = pred[]{:T(512)} compare(%count.1, %bound), direction=LT
}

%all-reduce-scatter.1 (whole: f32[128,128]) -> f32[128,64] {
  %whole = f32[128,128]{1,0:T(8,128)} parameter(0)
  ROOT %all-reduce.1 = f32[128,128]{1,0:T(8,128)} all-reduce(%whole), channel_id=5, replica_groups={{0,1},{2,3}}
}

ENTRY %main (p0: f32[28,128,128], p1: f32[3,5]) -> (f32[28,128,128], f32[3,5]) {
  %p0 = f32[28,128,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = f32[3,5]{1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %begin = (s32[]{:T(128)}, f32[28,128,128]{2,1,0:T(8,128)}) tuple(%zero, %p0)
  %loop = (s32[]{:T(128)}, f32[28,128,128]{2,1,0:T(8,128)}) while(%begin), condition=%condition, body=%body
  %stack.1 = f32[28,128,128]{2,1,0:T(8,128)} get-tuple-element(%loop), index=1
  %twice = f32[3,5]{1,0:T(8,128)} add(%p1, %p1), backend_config={"estimated_cycles":"7"}
  %square = f32[128,128]{1,0:T(8,128)S(1)} broadcast(%zero), dimensions={}
  %scattered = f32[128,64]{1,0:T(8,128)S(1)} fusion(%square), kind=kCustom, calls=%all-reduce-scatter.1
  %reduced = f32[3,5]{1,0:T(8,128)} all-reduce(%twice), channel_id=6, replica_groups=[4,4]<=[16], to_apply=%add
  ROOT %result = (f32[28,128,128]{2,1,0:T(8,128)}, f32[3,5]{1,0:T(8,128)}) tuple(%stack.1, %reduced)
}
"""
LAYER, TILE = 128 * 128 * 4, 8 * 128 * 4  # bytes; f32[3,5] lies in one tile


def test_loops_and_split_collectives_count_as_often_as_they_run():
    traffic = measure(HLO)
    assert sorted(traffic.collectives) == [
        Collective("all-gather", 2 * LAYER, 2, 28), Collective("all-reduce", TILE, 4, 1),
        Collective("reduce-scatter", LAYER, 2, 1)]
    assert traffic.cycles == 28 * 100 + 7 and traffic.unknown_loops == 0


def test_memory_is_moved_by_what_is_not_on_the_chip_and_of_a_stack_by_the_layer():
    counter = zero = 4  # read by the fusion in the loop, and by the broadcast
    assert measure(HLO).memory == 28 * (LAYER + counter) + 3 * TILE + 2 * TILE + zero


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    traffic = measure(HLO.replace("direction=LT", "direction=NE"))
    assert traffic.unknown_loops == 1
    assert Collective("all-gather", 2 * LAYER, 2, 1) in traffic.collectives
    told = HLO.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert Collective("all-gather", 2 * LAYER, 2, 3) in measure(told).collectives


def test_results_take_whole_tiles():
    assert result_bytes(HLO) == [28 * LAYER, TILE]
    assert result_bytes("HloModule a, entry_computation_layout={(f32[3,5]{1,0})->bf16[3,5]{1,0}}\n") == [30]
    with pytest.raises(ValueError, match="entry_computation_layout"):
        result_bytes("HloModule a\n")


@pytest.mark.parametrize("text, size", [
    ("f32[10,3]{1,0}", 120), ("bf16[2,3]{1,0:T(8,128)(2,1)}", 8 * 128 * 2), ("pred[7]{0}", 7), ("f32[]", 4),
    ("s4[6]{0}", 3), ("f8e4m3fn[6]{0}", 6), ("bf16[4,128,8]{1,2,0:T(8,128)(2,1)}", 4 * 128 * 8 * 2),
])
def test_sizes_of_shapes(text, size):
    assert [shape.bytes for shape in shapes_in(text)] == [size]


@pytest.mark.parametrize("text, size", [
    ("replica_groups={{0,1,2},{3,4,5}}", 3), ("replica_groups=[2,8]<=[16]", 8),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
    ("replica_groups=mesh['x'=2,'y'=4,'z'=8] {'x','z'}", 16), ("channel_id=1", 1),
])
def test_sizes_of_groups(text, size):
    assert group_size(text) == size


@pytest.mark.parametrize("kind, sent", [("all-gather", 75), ("reduce-scatter", 75), ("all-reduce", 150),
                                        ("all-to-all", 75), ("collective-permute", 100)])
def test_bytes_sent_around_a_ring(kind, sent):
    assert Collective(kind, 100, 4, 1).sent == sent and Collective(kind, 100, 4, 3).sent == 3 * sent
