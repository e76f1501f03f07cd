from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from builders import N, assert_same_chunk, make_chunk
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load

from moebench.errors import RunError
from moebench.schema import Chunk
from moebench.store import merge
from moebench.store.packing import opened, pack, press, unpack

BIG = 2**63 - 1
edges = st.sampled_from([-BIG - 1, -129, -128, 0, 255, 256, 2**31, BIG])
any_int = st.one_of(st.integers(-BIG - 1, BIG), st.integers(-130, 300), edges)
count = st.one_of(st.integers(0, BIG), st.integers(0, 70_000))
length = st.floats(0, width=32, allow_nan=False)


@st.composite
def any_chunk(draw: st.DrawFn) -> Chunk:
    size = draw(st.integers(0, 20))

    def ints(elements: st.SearchStrategy[int]) -> Any:
        return draw(arrays(np.int64, size, elements=elements))

    return Chunk(
        stage=draw(st.text(max_size=8)),
        index=ints(count),
        broken=draw(arrays(np.bool_, size)),
        clean_pred=ints(any_int),
        adv_pred=ints(any_int),
        distance=draw(arrays(np.float32, size, elements=length)),
        forwards=ints(count),
        backwards=ints(count),
        seconds=draw(st.floats(0, 1e6)),
    )


@given(any_chunk())
def test_a_chunk_survives_packing(chunk: Chunk) -> None:
    assert_same_chunk(unpack(chunk.stage, chunk.seconds, pack(chunk)), chunk)


@given(any_chunk(), st.integers(0, 2000))
def test_a_shortened_blob_is_refused(chunk: Chunk, cut: int) -> None:
    blob = pack(chunk)
    with pytest.raises(RunError, match=r"a chunk of stage .* is damaged"):
        unpack(chunk.stage, 0.0, blob[: cut % len(blob)])


def test_small_numbers_take_little_room() -> None:
    chunk = make_chunk("apgd-ce", range(256))
    assert {array.dtype.itemsize for name, array in load(opened(pack(chunk))).items() if name != "distance"} == {1}
    assert len(opened(pack(chunk))) < 256 * 11 + 800
    assert len(pack(chunk)) < 256 * 11
    assert press(pack(chunk)) == pack(chunk)
    assert unpack("apgd-ce", chunk.seconds, opened(pack(chunk))) is not None, "plain blobs of earlier versions are read"


@pytest.mark.parametrize("spoil", [lambda blob: blob[:-9], lambda blob: blob[:20] + b"?" + blob[21:]])
def test_a_damaged_compressed_blob_is_refused(spoil: Callable[[bytes], bytes]) -> None:
    with pytest.raises(RunError, match="is damaged"):
        unpack("apgd-ce", 1.0, spoil(pack(make_chunk("apgd-ce", range(64)))))


def test_arrays_of_other_integer_types_and_strides_are_accepted() -> None:
    chunk = make_chunk("apgd-ce", range(6))
    odd = Chunk(
        stage=chunk.stage,
        index=chunk.index.astype(np.int32),
        broken=np.zeros(12, np.bool_)[::2],
        clean_pred=chunk.clean_pred.astype(np.uint8),
        adv_pred=np.ones(12, np.int64)[::2],
        distance=chunk.distance.astype(np.float64),
        forwards=chunk.forwards,
        backwards=chunk.backwards,
        seconds=chunk.seconds,
    )
    assert_same_chunk(unpack(odd.stage, odd.seconds, pack(odd)), chunk)


@st.composite
def some_chunks(draw: st.DrawFn) -> list[Chunk]:
    """Chunks as a cell has them: in each stage a sample at most once, in any order, the clean stage somewhere."""
    chunks = []
    for stage in draw(st.permutations(["clean", "apgd-ce", "apgd-t"])):
        samples = draw(st.permutations(range(N)))[: draw(st.integers(0, N))]
        broken = draw(st.sets(st.integers(0, N - 1)))
        cut = draw(st.integers(0, len(samples)))
        for part in (samples[:cut], samples[cut:]):
            size = len(part)
            preds = draw(arrays(np.int64, (2, size), elements=st.integers(0, 9)))
            distance = draw(arrays(np.float32, size, elements=st.floats(0, 1, width=32)))
            changes = {"clean_pred": preds[0], "adv_pred": preds[1], "distance": distance}
            chunks.append(make_chunk(stage, part, broken, **changes))
    return chunks


@given(some_chunks())
def test_merging_follows_each_sample_through_the_stages(chunks: list[Chunk]) -> None:
    told: dict[int, dict[str, Any]] = {}
    for chunk in [c for c in chunks if c.stage == "clean"] + [c for c in chunks if c.stage != "clean"]:
        for row, sample in enumerate(chunk.index.tolist()):
            new = {"broken": False, "clean": int(chunk.clean_pred[row]), "forwards": 0, "backwards": 0, "stage": ""}
            first = sample not in told
            seen = told.setdefault(sample, new)
            falls = bool(chunk.broken[row]) and not seen["broken"]
            if first or falls:
                seen.update(adv=int(chunk.adv_pred[row]), distance=float(chunk.distance[row]))
            if falls:
                seen.update(broken=True, stage="" if chunk.stage == "clean" else chunk.stage)
            seen["forwards"] += int(chunk.forwards[row])
            seen["backwards"] += int(chunk.backwards[row])
    got = merge(chunks)
    assert got.index.tolist() == sorted(told)
    expected = [told[sample] for sample in sorted(told)]
    pairs = {
        "broken": got.broken,
        "clean": got.clean_pred,
        "adv": got.adv_pred,
        "distance": got.distance,
        "forwards": got.forwards,
        "backwards": got.backwards,
    }
    for name, array in pairs.items():
        assert array.tolist() == [sample[name] for sample in expected], name
    assert got.stage == tuple(sample["stage"] for sample in expected)


def test_merging_nothing_gives_nothing() -> None:
    got = merge([])
    assert got.index.size == got.broken.size == got.distance.size == 0 and got.stage == ()
