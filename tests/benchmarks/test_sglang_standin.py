"""The stand-in for SGLang's CPU kernels does what its contracts say: each kernel against slow code that shares nothing with it.

SGLang is not needed: the files are loaded by their paths, the stand-in under a name at which it registers no operators.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.enumeration import random_parents, random_tree

FOLDER = Path(__file__).parents[2] / "benchmarks" / "engines" / "sglang"
HEADS, KEY_HEADS, WIDTH, SLOTS, LONGEST = 6, 2, 8, 200, 40


def load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kernels = load("sglang_standin", FOLDER / "standin" / "sgl_kernel" / "__init__.py")
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(FOLDER.parent))
    child = load("sglang_child_tested", FOLDER.parent / "sglang_child.py")


class Cache:
    """A paged cache with texts of given lengths at scattered slots of scattered rows of the table."""

    def __init__(self, lengths: list[int], seed: int) -> None:
        torch.manual_seed(seed)
        self.keys, self.values = torch.randn(SLOTS, KEY_HEADS, WIDTH), torch.randn(SLOTS, KEY_HEADS, WIDTH)
        self.pool = torch.randperm(len(lengths) + 3)[: len(lengths)]
        self.table = torch.full((len(lengths) + 3, LONGEST), -1, dtype=torch.int32)
        slots = torch.randperm(SLOTS)
        for row, length in zip(self.pool, lengths):
            self.table[row, :length], slots = slots[:length], slots[length:]
        self.lengths = torch.tensor(lengths)

    def text(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        slots = [int(self.table[self.pool[b], place]) for place in range(int(self.lengths[b]))]
        return torch.stack([self.keys[slot] for slot in slots]), torch.stack([self.values[slot] for slot in slots])


def dense_attention(query_HD, keys_NKD, values_NKD, seen: list[int], scale: float):
    """[H, D] of one query, by the definition, in float64."""
    out = torch.zeros(query_HD.shape, dtype=torch.float64)
    for head in range(HEADS):
        shared = head // (HEADS // KEY_HEADS)
        weights = torch.stack([query_HD[head].double() @ keys_NKD[n, shared].double() * scale for n in seen]).exp()
        out[head] = sum(weight * values_NKD[n, shared].double() for weight, n in zip(weights / weights.sum(), seen))
    return out.float()


def ancestors(parents: list[int], row: int) -> set[int]:
    line = set()
    while row >= 0:
        line.add(row)
        row = parents[row]
    return line


def extend(cache: Cache, query, keys, values, output, new: list[int], mask=None, causal: bool = True) -> None:
    start = torch.tensor([sum(new[:b]) for b in range(len(new))])
    tables = (cache.table, cache.pool, cache.lengths, torch.tensor(new), start)
    rest = (max(new), WIDTH**-0.5, 0.0, False, 0, None, None, mask, causal)
    kernels.extend_attention_cpu(query, keys, values, output, cache.keys, cache.values, 1.0, 1.0, *tables, *rest)


# ---- attention ----


@pytest.mark.parametrize("kind", ["tree", "causal", "all"])
@pytest.mark.parametrize("in_cache", [True, False])
def test_extension_is_dense_masked_attention(kind, in_cache):
    rng, cache = random.Random(0), Cache([9, 17, 12], 1)
    new = [5, 5, 5] if kind == "tree" else [5, 1, 12]
    trees = [random_tree(rng, count, 9)[1] for count in new]
    sees = {
        "tree": lambda b, i, j: j in ancestors(trees[b], i),
        "causal": lambda b, i, j: j <= i,
        "all": lambda b, i, j: True,
    }[kind]
    mask = [sees(b, i, j) for b, count in enumerate(new) for i in range(count) for j in range(count)]
    query, keys, values = torch.randn(sum(new), HEADS, WIDTH), *torch.randn(2, sum(new), KEY_HEADS, WIDTH)
    output = torch.zeros_like(query)
    given = (None, None) if in_cache else (keys.flatten(1), values.flatten(1))
    extend(cache, query, *given, output, new, torch.tensor(mask) if kind == "tree" else None, kind == "causal")
    row = 0
    for b, count in enumerate(new):
        text_keys, text_values = cache.text(b)
        before, here = int(cache.lengths[b]) - count, slice(row, row + count)
        if not in_cache:
            text_keys, text_values = torch.cat([text_keys[:before], keys[here]]), torch.cat([text_values[:before], values[here]])
        for i in range(count):
            seen = [*range(before), *(before + j for j in range(count) if sees(b, i, j))]
            torch.testing.assert_close(output[row], dense_attention(query[row], text_keys, text_values, seen, WIDTH**-0.5))
            row += 1


@pytest.mark.parametrize("written_before", [True, False])
def test_decoding_is_dense_attention_over_the_text_and_the_new_token(written_before):
    cache = Cache([9, 17, 1], 2)
    query, key, value = torch.randn(3, HEADS, WIDTH), *torch.randn(2, 3, KEY_HEADS * WIDTH)
    loc = torch.tensor([cache.table[cache.pool[b], cache.lengths[b] - 1] for b in range(3)])
    untouched = [slot for slot in range(SLOTS) if slot not in loc.tolist()]
    before, output = cache.keys.clone(), torch.zeros_like(query)
    given = (None, None) if written_before else (key, value)
    tables = (cache.table, cache.pool, cache.lengths)
    kernels.decode_attention_cpu(
        query, cache.keys, cache.values, 1.0, 1.0, output, *given, loc, torch.zeros(0), *tables, 0.3, 0.0, False, 0
    )
    if not written_before:
        assert torch.equal(cache.keys[loc], key.view(3, KEY_HEADS, WIDTH)) and torch.equal(
            cache.values[loc], value.view(3, KEY_HEADS, WIDTH)
        )
        assert torch.equal(cache.keys[untouched], before[untouched])
    for b in range(3):
        wanted = dense_attention(query[b], *cache.text(b), list(range(int(cache.lengths[b]))), 0.3)
        torch.testing.assert_close(output[b], wanted)


def test_a_tree_verified_at_once_is_each_of_its_paths_read_alone():
    parents = random_tree(random.Random(3), 7, 5)[1]
    cache = Cache([10 + 7], 3)
    query, output = torch.randn(7, HEADS, WIDTH), torch.zeros(7, HEADS, WIDTH)
    mask = torch.tensor([j in ancestors(parents, i) for i in range(7) for j in range(7)])
    extend(cache, query, None, None, output, [7], mask)
    for row in range(7):
        path = sorted(ancestors(parents, row))
        alone = Cache([10 + 7], 3)
        columns = [*range(10), *(10 + one for one in path)]
        alone.table[alone.pool[0], : len(columns)] = cache.table[cache.pool[0], columns]
        alone.lengths[0] = len(columns)
        chain = torch.zeros(len(path), HEADS, WIDTH)
        extend(alone, query[path], None, None, chain, [len(path)])
        torch.testing.assert_close(output[row], chain[-1])


@pytest.mark.parametrize("place, value, word", [(6, 1.5, "scaled"), (14, 30.0, "capped"), (15, True, "cross"), (16, 128, "window")])
def test_attention_that_it_lacks_is_refused(place, value, word):
    cache = Cache([4], 0)
    one = torch.zeros(1, HEADS, WIDTH)
    given = [one, None, None, one, cache.keys, cache.values, 1.0, 1.0, cache.table, cache.pool, cache.lengths, torch.tensor([1])]
    given += [torch.tensor([0]), 1, 1.0, 0.0, False, 0]
    given[place + (place > 6)] = value
    with pytest.raises(NotImplementedError, match=word):
        kernels.extend_attention_cpu(*given)


def test_operators_are_found_where_sglang_looks_and_write_in_place():
    library = kernels.register("sglang_standin_test")
    cache = Cache([6], 4)
    query, output = torch.randn(1, HEADS, WIDTH), torch.zeros(1, HEADS, WIDTH)
    tables = (cache.table, cache.pool, cache.lengths)
    none = (None, None, torch.tensor([0]), torch.zeros(0))
    torch.ops.sglang_standin_test.decode_attention_cpu(
        query, cache.keys, cache.values, 1.0, 1.0, output, *none, *tables, 0.5, 0.0, False, 0
    )
    torch.testing.assert_close(output[0], dense_attention(query[0], *cache.text(0), list(range(6)), 0.5))
    assert hasattr(torch.ops.sglang_standin_test, "extend_attention_cpu")
    del library


def test_a_kernel_that_it_lacks_says_its_name():
    with pytest.raises(NotImplementedError, match="some_other_kernel"):
        kernels.some_other_kernel(1, key=2)


# ---- slots ----


def offsets(rng: random.Random, count: int) -> tuple[list[int], list[int]]:
    starts = [rng.randrange(10) for _ in range(count)]
    return starts, [start + rng.randrange(6) for start in starts]


@pytest.mark.parametrize("seed", range(5))
def test_slots_are_written_to_the_table_and_read_from_it(seed):
    rng, count = random.Random(seed), 4
    starts, ends = offsets(rng, count)
    pool = rng.sample(range(7), count)
    table = torch.zeros(7, LONGEST, dtype=torch.int32)
    slots = torch.tensor(rng.sample(range(1, 500), 30))
    wanted, used = table.clone(), 0
    for b in range(count):
        for place in range(starts[b], ends[b]):
            wanted[pool[b], place] = slots[used]
            used += 1
    given = (torch.tensor(pool), table, torch.tensor(starts, dtype=torch.int32), torch.tensor(ends, dtype=torch.int32))
    kernels.assign_req_to_token_pool_cpu(*given, slots, LONGEST)
    assert torch.equal(table, wanted)
    read = torch.full((30,), -7)
    kernels.assign_extend_cache_locs_cpu(*given, read, LONGEST)
    assert read.tolist() == slots[:used].tolist() + [-7] * (30 - used)


def test_a_drafts_slots_lie_behind_the_text_branch_after_branch():
    table = torch.arange(3 * 20, dtype=torch.int32).view(3, 20) + 100
    pool, lengths, topk, steps = torch.tensor([2, 0]), torch.tensor([5, 3]), 2, 3
    slots = torch.zeros(2 * topk * steps, dtype=torch.int64)
    kernels.assign_draft_cache_locs_contiguous_cpu(pool, table, lengths, slots, 20, topk, steps)
    assert slots.tolist() == [145, 146, 147, 148, 149, 150, 103, 104, 105, 106, 107, 108]
    branches = kernels.build_draft_decode_metadata_cpu(table, pool, lengths, topk, steps, 20)
    text, other = [140, 141, 142, 143, 144], [100, 101, 102]
    assert branches[0, :8].tolist() == [*text, 145, 146, 147] and branches[1, :8].tolist() == [*text, 148, 149, 150]
    assert branches[2, :6].tolist() == [*other, 103, 104, 105] and branches[3, :6].tolist() == [*other, 106, 107, 108]
    assert branches.shape == (4, 20) and branches.dtype == table.dtype


def test_bonus_tokens_are_the_last_accepted():
    bonus = torch.zeros(3, dtype=torch.int32)
    kernels.fill_bonus_tokens_cpu(torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]]), torch.tensor([1, 3, 2]), bonus, 3)
    assert bonus.tolist() == [1, 6, 8]


def test_slots_of_accepted_nodes_close_up():
    out = torch.zeros(6, dtype=torch.int64)
    accepted = torch.tensor([[0, 2, -1], [3, -1, -1]], dtype=torch.int32)
    kernels.fill_accept_out_cache_loc_cpu(accepted, torch.tensor([10, 11, 12, 13, 14, 15]), out)
    assert out.tolist() == [10, 12, 13, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_are_copied_in_every_layer_as_if_all_were_read_first(dtype):
    caches = [torch.randn(12, 2, 4).to(dtype) for _ in range(3)] + [torch.randn(12, 5).to(dtype)]
    before = [cache.clone() for cache in caches]
    targets, sources = [3, 4, 7], [4, 5, 3]
    pointers = torch.tensor([cache.data_ptr() for cache in caches], dtype=torch.uint64)
    widths = torch.tensor([cache[0].numel() * cache.element_size() for cache in caches])
    kernels.copy_all_layer_kv_cache_cpu(pointers, widths, torch.tensor(targets), torch.tensor(sources))
    for cache, old in zip(caches, before):
        for slot in range(12):
            source = sources[targets.index(slot)] if slot in targets else slot
            assert torch.equal(cache[slot], old[source])


# ---- trees ----


class Grown:
    """A tree as SGLang grows one: the best topk of the newest level are expanded by topk each, then the best of all are chosen.

    Candidates are kept as the tokens that lead to them, which is what the tests compare; `expanded` and `chosen` are what SGLang hands
    over.
    """

    def __init__(self, rng: random.Random, topk: int, steps: int, nodes: int) -> None:
        self.paths: list[tuple[int, ...]] = []
        scores: list[float] = []
        self.expanded, frontier = [-1], [((), 1.0)]
        for step in range(steps):
            level = len(self.paths)
            for path, score in frontier:
                for token in rng.sample(range(30), topk):
                    self.paths.append((*path, token))
                    scores.append(score * rng.uniform(0.1, 0.9))
            best = sorted(range(level, len(self.paths)), key=lambda one: -scores[one])[:topk]
            frontier = [(self.paths[one], scores[one]) for one in best]
            if step < steps - 1:
                self.expanded += best if step else range(topk)
                frontier = frontier if step else [(self.paths[one], scores[one]) for one in range(topk)]
        self.chosen = sorted(sorted(range(len(self.paths)), key=lambda one: -scores[one])[: nodes - 1])
        self.rows = [(), *(self.paths[one] for one in self.chosen)]


SHAPES = [(1, 3, 4), (1, 1, 2), (4, 3, 8), (2, 5, 12), (8, 2, 30), (3, 1, 4)]


def built(grown: list[Grown], topk: int, steps: int, nodes: int, lengths: list[int]) -> dict[str, torch.Tensor]:
    batch = len(grown)
    mask, places = torch.ones(batch * nodes * nodes, dtype=torch.bool), torch.zeros(batch * nodes, dtype=torch.int64)
    index, first, following = torch.full((3, batch, nodes), -1)
    parents = torch.tensor([one.expanded for one in grown]) if steps > 1 else torch.empty(batch, 0, dtype=torch.int64)
    chosen = torch.tensor([one.chosen for one in grown])
    given = (parents, chosen, torch.tensor(lengths), mask, places, index, first, following)
    kernels.build_tree_kernel_efficient_cpu(*given, topk, steps, nodes, 1)
    return {"mask": mask.view(batch, nodes, nodes), "places": places.view(batch, nodes), "index": index, "first": first, "next": following}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(5))
def test_a_tree_is_laid_out_by_who_leads_to_whom(shape, seed):
    topk, steps, nodes = shape
    rng, lengths = random.Random(seed), [7, 30]
    grown = [Grown(rng, topk, steps, nodes) for _ in lengths]
    found = built(grown, topk, steps, nodes, lengths)
    assert found["index"].flatten().tolist() == list(range(2 * nodes))
    for b, one in enumerate(grown):
        rows = one.rows
        for i in range(nodes):
            assert found["mask"][b, i].tolist() == [rows[i][: len(path)] == path for path in rows]
            assert int(found["places"][b, i]) == lengths[b] + len(rows[i])
            children = [j for j in range(1, nodes) if rows[j][:-1] == rows[i]]
            linked, child = [], int(found["first"][b, i])
            while child >= 0:
                linked.append(child)
                child = int(found["next"][b, child])
            assert linked == children


@pytest.mark.parametrize("seed", range(5))
def test_what_is_recorded_of_a_tree_gives_its_parents_back(seed):
    parents = random_parents(random.Random(seed), 9)
    first, following = kernels.links_of(parents)
    assert child.parents_of({"tokens": [0] * 9, "first_child": first, "next_sibling": following}) == parents


def test_the_end_of_an_answer_cuts_its_last_round():
    rounds = [{"accepted": accepted} for accepted in (0, 2, 3)]
    assert child.steps_of(rounds, [0] * 9) == [1, 3, 4]
    assert child.steps_of(rounds, [0] * 7) == [1, 3, 2]


def test_a_row_without_its_parent_is_refused():
    with pytest.raises(ValueError, match="its parent 1 was not"):
        kernels.parents_of([0, 4], [-1, 0, 1], 2)


def longest_match(rows: list[tuple[int, ...]], target: dict[tuple[int, ...], int], most: int) -> list[int]:
    """Of all paths that the target would have written token by token, the longest: its rows, root first."""
    right = [path for path in rows if len(path) < most and all(target[path[:i]] == path[i] for i in range(len(path)))]
    best = max(right, key=len)
    return [rows.index(best[:length]) for length in range(len(best) + 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(10))
def test_greedy_verification_finds_the_longest_path_the_target_would_write(shape, seed):
    topk, steps, nodes = shape
    rng = random.Random(seed)
    grown = [Grown(rng, topk, steps, nodes) for _ in range(3)]
    links, targets = built(grown, topk, steps, nodes, [5, 6, 7]), []
    for one in grown:  # mostly a child's token, else one that no child has
        children = {path: [row[-1] for row in one.rows[1:] if row[:-1] == path] for path in one.rows}
        targets.append({path: rng.choice([*children[path], *children[path], 99]) for path in one.rows})
    most = rng.choice([steps + 1, 2])
    predicts, accepted = torch.zeros(3 * nodes, dtype=torch.int32), torch.full((3, most), -1, dtype=torch.int32)
    counts = torch.zeros(3, dtype=torch.int32)
    candidates = torch.tensor([[5, *(path[-1] for path in one.rows[1:])] for one in grown])
    choices = torch.tensor([[target[path] for path in one.rows] for one, target in zip(grown, targets)])
    kernels.verify_tree_greedy_cpu(
        predicts=predicts,
        accept_index=accepted,
        accept_token_num=counts,
        candidates=candidates,
        retrive_index=links["index"],
        retrive_next_token=links["first"],
        retrive_next_sibling=links["next"],
        target_predict=choices,
    )
    for b, (one, target) in enumerate(zip(grown, targets)):
        path = longest_match(one.rows, target, most)
        numbers = [b * nodes + row for row in path]
        assert int(counts[b]) == len(path) - 1
        assert accepted[b].tolist() == numbers + [-1] * (most - len(path))
        wanted = [target[one.rows[row]] if row in path else 0 for row in range(nodes)]
        assert predicts[b * nodes : (b + 1) * nodes].tolist() == wanted
