"""Reading a compiled program's text: kernels, loops by their trip counts, cycles, copies."""

import pytest

from orthrus_jax.aot.text import Text, nbytes

PROGRAM = """HloModule m, is_scheduled=true

%fused_turn (p: f32[512,512]) -> f32[512,512] {
  %p = f32[512,512]{1,0} parameter(0)
  ROOT %turned = f32[512,512]{0,1} transpose(%p), dimensions={1,0}
}

%fused_add (p: f32[512,512]) -> f32[512,512] {
  %p.1 = f32[512,512]{1,0} parameter(0)
  ROOT %sum = f32[512,512]{1,0} add(%p.1, %p.1)
}

%fused_write (p: f32[512,512]) -> f32[512,512] {
  %p.2 = f32[512,512]{1,0} parameter(0)
  ROOT %written = f32[512,512]{1,0} dynamic-update-slice(%p.2, %p.2, %p.2, %p.2)
}

%more (t: (s32[], f32[512,512])) -> pred[] {
  %t.2 = (s32[], f32[512,512]{1,0}) parameter(0)
  ROOT %less = pred[] fusion(%t.2), kind=kLoop, calls=%fused_less
}

%chunk (t: (s32[], f32[512,512])) -> (s32[], f32[512,512]) {
  %t.3 = (s32[], f32[512,512]{1,0}) parameter(0)
  %y = f32[512,512]{1,0} fusion(%t.3), kind=kLoop, calls=%fused_add, metadata={op_name="jit(f)/while/body/M/layers_0/add"}, backend_config={"estimated_cycles":"10"}
  ROOT %o = (s32[], f32[512,512]{1,0}) tuple(%y, %y)
}

%step (t: (s32[], f32[512,512])) -> (s32[], f32[512,512]) {
  %t.4 = (s32[], f32[512,512]{1,0}) parameter(0)
  %x = f32[512,512]{1,0} get-tuple-element(%t.4), index=1
  %fetched = f32[512,512]{1,0:T(8,128)S(1)} copy(%x)
  %copied = f32[512,512]{0,1} fusion(%x), kind=kLoop, calls=%fused_turn, backend_config={"estimated_cycles":"100"}
  %in_place = f32[512,512]{1,0} fusion(%x), kind=kLoop, calls=%fused_write
  %known = (s32[], f32[512,512]{1,0}) while(%t.4), condition=%more, body=%chunk, backend_config={"known_trip_count":{"n":"3"}}
  %unknown = (s32[], f32[512,512]{1,0}) while(%known), condition=%more, body=%chunk
  ROOT %o.1 = (s32[], f32[512,512]{1,0}) tuple(%x, %copied)
}

ENTRY %main (a: f32[512,512]) -> f32[512,512] {
  %a = f32[512,512]{1,0} parameter(0)
  %before = f32[512,512]{1,0} copy(%a)
  %t = (s32[], f32[512,512]{1,0}) tuple(%before)
  %w = (s32[], f32[512,512]{1,0}) while(%t), condition=%more, body=%step
}
"""  # noqa: E501


@pytest.mark.parametrize("trips", [1, 8])
def test_turn_adds_up_what_the_loop_runs(trips: int) -> None:
    text = Text(PROGRAM, trips)
    assert text.loop() == "step"
    turn = text.turn("step")
    assert turn.kernels == 3 + 2 * 3 + 2 * trips  # conditions launch a kernel too
    assert turn.layer_kernels == 3 + trips
    assert turn.cycles == 100 + 10 * 3 + 10 * trips
    assert turn.inner_loops == 2
    assert turn.made == (1 + 3 + trips) * 2**20  # what is updated in place or fetched is not
    assert turn.copies == ("copied: f32[512,512]{0,1}",)


def test_large_copies_are_those_of_the_whole_program() -> None:
    names = [made.split(":")[0] for made in Text(PROGRAM).large_copies()]
    assert names == ["before", "copied"]
    assert Text(PROGRAM.replace("512,512", "256,256")).large_copies() == ()


def test_program_without_a_loop_has_none() -> None:
    assert Text(PROGRAM[: PROGRAM.index("  %w =")] + "}\n").loop() is None


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[8,4096,128]{2,1,0}", 8 << 20),
        ("(f32[2]{0}, /*index=1*/s32[])", 8),
        ("pred[7]{0}", 7),
        ("f8e4m3fn[16]{0}", 16),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_shape_are_those_of_its_largest_array(shape: str, size: int) -> None:
    assert nbytes(shape) == size
