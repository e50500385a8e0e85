"""Bytes, kernels and collectives of a compiled program, counted by hand."""

from __future__ import annotations

import pytest

from vpm_jax.benchmark import elsewhere, program

TEXT = """HloModule jit_step, is_scheduled=true

%fused_computation (param_0: f32[10,4], param_1: bf16[4]) -> f32[10,4] {
  %param_0 = f32[10,4]{1,0} parameter(0)
  ROOT %add = f32[10,4]{1,0} add(%param_0, %param_0)
}

%command_buffer (p: f32[10,4], p.1: bf16[4]) -> (f32[10,4], f32[]) {
  %p = f32[10,4]{1,0} parameter(0)
  %p.1 = bf16[4]{0} parameter(1)
  %fusion.1 = f32[10,4]{1,0} fusion(%p, %p.1), kind=kLoop, calls=%fused_computation
  %sum = f32[] fusion(%fusion.1), kind=kInput, calls=%other
  ROOT %tuple = (f32[10,4]{1,0}, f32[]) tuple(%fusion.1, %sum)
}

ENTRY %main.9 (a: f32[10,4], b: bf16[4]) -> (f32[10,4], f32[]) {
  %a = f32[10,4]{1,0} parameter(0)
  %b = bf16[4]{0} parameter(1)
  %call = (f32[10,4]{1,0}, f32[]) call(%a, %b), to_apply=%command_buffer
  %x = f32[10,4]{1,0} get-tuple-element(%call), index=0
  %conv = (f32[10,4]{1,0}, u8[999]{0}) custom-call(%x, %x), custom_call_target="__cudnn$convForward"
  %y = f32[10,4]{1,0} get-tuple-element(%conv), index=0
  %near = f32[10,4]{1,0:T(8,128)S(1)} fusion(%y), kind=kLoop, calls=%other
  %all-reduce-start = f32[10,4]{1,0} all-reduce-start(%y), to_apply=%add
  %all-reduce-done = f32[10,4]{1,0} all-reduce-done(%all-reduce-start)
  ROOT %result = (f32[10,4]{1,0}, f32[10,4]{1,0}) tuple(%all-reduce-done, %near)
}
"""
TPU = """
ENTRY %main (a: bf16[4,6,32]) -> f32[6,32] {
  %a = bf16[4,6,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %slice-start = ((bf16[4,6,32]{2,1,0:T(8,128)(2,1)}), bf16[1,6,32]{2,1,0:T(8,128)(2,1)S(1)}) slice-start(%a)
  %slice-done = bf16[1,6,32]{2,1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start)
  %slice.1 = bf16[2,6,32]{2,1,0:T(8,128)(2,1)S(1)} slice(%a)
  %near = f32[6,32]{1,0:T(8,128)S(1)} fusion(%slice-done, %slice.1), calls=%x, backend_config={"estimated_cycles":"70"}
  %all-reduce = f32[6,32]{1,0:T(8,128)S(1)} all-reduce(%near), channel_id=1, to_apply=%near
  %copy-start = (f32[6,32]{1,0:T(8,128)}, f32[6,32]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%near)
  ROOT %far = f32[6,32]{1,0:T(8,128)} copy-done(%copy-start)
}
"""
LARGE, SMALL, SCALAR = 160, 8, 4  # bytes of f32[10,4], bf16[4] and f32[]


def test_every_kernel_reads_its_operands_and_writes_its_result_once():
    found = program.read(TEXT)
    assert found.kernels == 4
    add, total, convolution, near = LARGE + SMALL + LARGE, LARGE + SCALAR, LARGE + LARGE, LARGE
    assert found.moved == add + total + convolution + near
    assert found.collectives == [LARGE]


def test_a_tpu_moves_whole_tiles_between_its_memories():
    found, tile = program.read(TPU), 8 * 128
    first, half, result = 2 * tile, 2 * 2 * tile, 4 * tile
    assert (found.kernels, found.moved, found.cycles) == (4, first + half + result, 70)
    assert found.collectives == [result]  # near the cores or not, it goes to the other devices


def test_an_all_reduce_sends_nearly_twice_its_bytes():
    chip = elsewhere.GPUS["h200"]
    assert elsewhere.collective_seconds([1e9], 1, chip) == 0
    seconds = elsewhere.collective_seconds([450e9, 0], 8, chip)
    assert seconds == pytest.approx(2 * 7 / 8 / elsewhere.OF_LINK + 2 * elsewhere.LATENCY)
