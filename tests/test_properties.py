"""Rules that hold for any tree, mask, text, line and setting, looked for by hypothesis in the odd corners of each."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eyas.config import PLAIN, EyasError, Sampling, TreeShape
from eyas.decode.text import TextStream
from eyas.decode.tree import Tree, merge
from eyas.files.chat_data import ROLES, messages_of
from eyas.files.eagle3_files import config_from_file, config_to_file
from eyas.files.records import object_of, records
from eyas.model.cache import KVCache
from eyas.model.draft import draft_config
from eyas.model.mask import ancestor_mask
from tests.tiny import byte_tokenizer, tiny_config

Path = tuple[int, ...]  # tokens from a tree's root down to a node


def one_line(error: EyasError) -> bool:
    return "\n" not in str(error) and "\r" not in str(error)


# ---- trees and masks ----


@st.composite
def forests(draw) -> list[int]:
    """Parents: each row's among those before it, or -1."""
    size = draw(st.integers(1, 24))
    return [draw(st.integers(-1, row - 1)) for row in range(size)]


@st.composite
def trees(draw, root: int = 7, most: int = 14) -> Tree:
    """Few tokens, so that cousins are often equal; scores that often tie."""
    tokens, parents, depths, scores = [root], [-1], [0], [0.0]
    taken = set()
    for _ in range(draw(st.integers(0, most))):
        parent, token = draw(st.integers(0, len(tokens) - 1)), draw(st.integers(0, 3))
        if (parent, token) not in taken:
            taken.add((parent, token))
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
            scores.append(scores[parent] - draw(st.sampled_from([0.0, 0.25, 1.0])))
    return Tree(tokens, parents, depths, scores)


def paths(tree: Tree) -> dict[Path, float]:
    lines: list[Path] = []
    for token, parent in zip(tree.tokens, tree.parents):
        lines.append((*(lines[parent] if parent >= 0 else ()), token))
    assert len(set(lines)) == len(tree), "a path leads to one node"
    return dict(zip(lines, tree.scores))


@given(forests())
def test_a_row_sees_itself_and_its_ancestors(parents):
    seen = ancestor_mask(parents).tolist()
    for row in range(len(parents)):
        line, up = {row}, parents[row]
        while up >= 0:
            line.add(up)
            up = parents[up]
        assert seen[row] == [column in line for column in range(len(parents))]


@given(trees(), st.data())
def test_what_is_kept_of_a_tree_is_as_it_was(tree, data):
    chosen = data.draw(st.sets(st.integers(0, len(tree) - 1)))
    rows = {0}
    for row in chosen:
        while row > 0:
            rows.add(row)
            row = tree.parents[row]
    kept, names = tree.keep(rows), list(paths(tree))
    assert paths(kept) == {names[row]: tree.scores[row] for row in sorted(rows)}
    assert kept.depths == [tree.depths[row] for row in sorted(rows)]
    for row, children in enumerate(kept.children):
        assert children == {kept.tokens[child]: child for child in range(1, len(kept)) if kept.parents[child] == row}
    assert kept.keep(range(len(kept))) == kept


@given(trees())
def test_the_best_nodes_of_a_tree_grow_by_one_and_never_change(tree):
    before: dict[Path, float] = {}
    for nodes in range(1, len(tree) + 2):
        best = paths(tree.best(nodes))
        assert len(best) == min(nodes, len(tree)) and before.items() <= best.items()
        left_out = paths(tree).keys() - best.keys()
        assert max((paths(tree)[path] for path in left_out), default=-9.0) <= min(best.values())
        before = best


@given(st.lists(trees(), min_size=1, max_size=4))
def test_merging_is_the_union_of_paths_in_any_order_and_grouping(several):
    union: dict[Path, float] = {}
    for tree in several:
        for path, score in paths(tree).items():
            union[path] = max(score, union.get(path, score))
    assert paths(merge(several)) == union == paths(merge(several[::-1]))
    assert paths(merge([merge(several[:2]), *several[2:]])) == union
    assert merge([merge(several)] * 2) == merge(several)


# ---- the cache ----

CAPACITY = 9  # few, so that it is often full to the last row


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["read", "read", "read", "cut", "clear", "copy"]), st.data()), max_size=12))
def test_a_cache_holds_the_rows_that_were_kept(steps):
    cache, held, fresh = KVCache(2, 3, CAPACITY, 1, 1, torch.float64, torch.device("cpu")), [[], [], []], 0
    for slot, step, data in steps:
        if step == "read":
            count = data.draw(st.integers(1, 6))
            if len(held[slot]) + count > CAPACITY:
                continue
            rows = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
            new = list(range(fresh + 1, fresh + 1 + count))
            fresh += count
            for layer in range(2):
                given_rows = torch.tensor(new, dtype=torch.float64).view(-1, 1, 1) + 1000 * layer
                keys, values = cache.write(layer, slot, given_rows, -given_rows)
                expected = [row + 1000 * layer for row in held[slot] + new]
                assert keys.flatten().tolist() == expected and values.flatten().tolist() == [-row for row in expected]
            cache.keep(slot, rows)
            held[slot] += [new[row] for row in rows]
        elif step == "cut":
            length = data.draw(st.integers(0, 8))
            cache.cut(slot, length)
            held[slot] = held[slot][:length]
        elif step == "clear":
            cache.clear(slot)
            held[slot] = []
        else:
            source = data.draw(st.integers(0, 2))
            length = data.draw(st.integers(0, len(held[source])))
            cache.copy_prefix(cache, source, slot, length)
            held[slot] = held[source][:length]
        assert cache.lengths == [len(rows) for rows in held]
        for each, rows in enumerate(held):
            for layer in range(2):
                assert cache.keys[layer, each, 0, : len(rows), 0].tolist() == [row + 1000 * layer for row in rows]
                assert cache.values[layer, each, 0, : len(rows), 0].tolist() == [-row - 1000 * layer for row in rows]


# ---- text ----

MERGED = byte_tokenizer(merges=[("a", "b"), ("ab", "ab"), ("Ã", "©"), ("ð", "Ł")])  # an e with an accent; half of an emoji
IDS = st.lists(st.integers(0, len(MERGED) - 1), max_size=20)
WORDS = st.lists(st.sampled_from(["a", "b", "ab", "é", "🦅", " ", "\n", "x"]), max_size=12)


def pieces_of(stream: TextStream, ids: list[int]) -> list[str]:
    pieces = []
    for token in ids:
        if stream.push(token):
            break
        pieces.append(stream.certain())
    stream.finish()
    return [*pieces, stream.certain()]


@given(st.one_of(IDS, WORDS.map(lambda words: MERGED("".join(words), add_special_tokens=False)["input_ids"])))
def test_streamed_pieces_are_the_text_decoded_whole(ids):
    stream = TextStream(MERGED)
    assert "".join(pieces_of(stream, ids)) == MERGED.decode(ids, skip_special_tokens=True) == stream.text


@given(WORDS, st.lists(st.text("ab é🦅", max_size=4), max_size=3))
def test_a_stop_string_is_never_shown_and_nothing_before_it_is_lost(words, stops):
    ids = MERGED("".join(words), add_special_tokens=False)["input_ids"]
    stream, whole = TextStream(MERGED, stops), MERGED.decode(ids, skip_special_tokens=True)
    assert "".join(pieces_of(stream, ids)) == stream.text
    real = [stop for stop in stops if stop]
    assert whole.startswith(stream.text) and not any(stop in stream.text for stop in real)
    assert stream.stopped == any(stop in whole for stop in real)
    if stream.stopped:
        assert whole[len(stream.text) :].startswith(tuple(real))
    else:
        assert stream.text == whole


# ---- what users hand in ----

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
ROLE = st.sampled_from([*ROLES]) | JSON
CALL = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": st.text(max_size=3), "arguments": st.text(max_size=3) | JSON})})
FIELDS = {
    "role": ROLE,
    "from": ROLE,
    "content": ROLE,
    "value": ROLE,
    "weight": st.booleans() | JSON,
    "name": JSON,
    "reasoning_content": JSON,
}
TURN = st.fixed_dictionaries({}, optional={**FIELDS, "tool_calls": st.lists(CALL | JSON, max_size=2) | JSON}) | JSON
TURNS = st.lists(TURN, max_size=3) | JSON
LINE = (
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("messages", "conversations", "prompt", "completion"), TURNS),
            **dict.fromkeys(
                ("instruction", "output", "input", "history", "system", "text", "tools", "loss_mask", "chat_template_kwargs"), JSON
            ),
        },
    )
    | JSON
)


def object_in(line):
    """The object of a line; what is wrong with it is raised."""
    row = object_of(line)
    if isinstance(row, EyasError):
        raise row
    return row


@given(st.one_of(LINE.map(json.dumps), LINE.map(lambda value: json.dumps(value, ensure_ascii=False)), st.text()))
def test_a_line_of_chat_data_is_a_conversation_or_one_line_of_complaint(line):
    try:
        conversation = messages_of(object_in(line))
    except EyasError as error:
        assert one_line(error)
        return
    for message in conversation or []:
        assert set(message) <= {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
        assert message["role"] in ("system", "developer", "user", "assistant", "tool")
        assert isinstance(message["content"], str) or message["tool_calls"]
        json.dumps(message, ensure_ascii=False).encode()  # text that can be written


@given(st.binary(max_size=60), st.sampled_from([b"", b"\x1f\x8b", b"[", b'{\n"', b"\xef\xbb\xbf["]))
def test_any_bytes_are_objects_or_one_line_of_complaint(tmp_path_factory, content, start):
    path = tmp_path_factory.mktemp("lines") / "data.jsonl"
    path.write_bytes(start + content)
    try:
        found = list(records(path, "prompt"))
    except EyasError as error:
        assert one_line(error)
    else:
        assert [place.number for place, _ in found] == sorted({place.number for place, _ in found})
        assert all(isinstance(value, dict) or one_line(value) for _, value in found)


DRAFT = config_to_file(draft_config(tiny_config(), 29, (1, 2, 4)), 5)


@given(
    st.one_of(
        st.dictionaries(st.sampled_from(sorted(DRAFT)), JSON, min_size=1, max_size=3).map(lambda damage: DRAFT | damage),
        st.sampled_from(sorted(DRAFT)).map(lambda name: {key: value for key, value in DRAFT.items() if key != name}),
        JSON,
    )
)
def test_a_drafts_config_is_read_or_refused_in_one_line(tmp_path_factory, fields):
    directory = tmp_path_factory.mktemp("draft")
    (directory / "config.json").write_text(json.dumps(fields))
    try:
        config = config_from_file(directory)
    except EyasError as error:
        assert one_line(error)
    else:
        assert config.draft_vocab_size <= config.vocab_size and len(config.taps) == 3


# ---- settings ----

COUNTS = st.lists(st.integers(0, 3), min_size=1, max_size=8)
SHAPES = st.one_of(
    st.builds(TreeShape, st.integers(1, 80), st.integers(0, 9), st.integers(1, 12)),
    st.integers(1, 20).map(TreeShape.chain),
    COUNTS.filter(lambda counts: counts[0] > 0).map(lambda counts: TreeShape.static(valid(counts))),
)


def valid(counts: list[int]) -> list[int]:
    """So many of the counts as there are nodes for."""
    nodes, found = 1, []
    for count in counts:
        if len(found) == nodes:
            break
        found.append(count)
        nodes += count
    return found


@given(SHAPES)
def test_a_shape_is_what_it_is_called(shape):
    assert TreeShape.parse(str(shape)) == shape


@given(SHAPES, st.integers(-2, 12), st.integers(-2, 12))
def test_a_cut_shape_is_no_deeper_and_cutting_twice_is_cutting_once(shape, levels, fewer):
    cut = shape.cut(levels)
    assert cut.levels == min(shape.levels, max(levels, 0)) and cut.nodes <= shape.nodes
    assert cut.cut(fewer) == shape.cut(min(levels, fewer)) or cut.cut(fewer).levels == shape.cut(min(levels, fewer)).levels == 0
    assert shape.cut(0) == PLAIN or shape.levels == 0
    assert TreeShape.parse(str(cut)) == cut


@given(st.text(max_size=20) | st.from_regex(r"(chain:|static:)?[0-9x.]{0,8}", fullmatch=True))
def test_any_other_word_is_refused_in_one_line(word):
    try:
        shape = TreeShape.parse(word)
    except EyasError as error:
        assert one_line(error)
    else:
        assert TreeShape.parse(str(shape)) == shape and shape.nodes >= 1


@given(st.floats(), st.integers(-3, 99), st.floats(), st.floats())
def test_sampling_is_sound_or_refused(temperature, top_k, top_p, min_p):
    try:
        sampling = Sampling(temperature, top_k, top_p, min_p)
    except EyasError as error:
        assert one_line(error)
    else:
        assert sampling.temperature >= 0 and sampling.top_k >= 0 and 0 < sampling.top_p <= 1 and 0 <= sampling.min_p <= 1


@pytest.mark.parametrize("depth", [100, 900, 960, 970, 980, 985, 990, 995, 100_000])
def test_a_line_nested_however_deeply_is_one_line_of_complaint(depth):
    with pytest.raises(EyasError) as caught:
        messages_of(object_in('{"messages": [{"role": ' + "[" * depth + "]" * depth + "}]}"))
    assert one_line(caught.value)
