"""A stand-in in plain PyTorch for those kernels of SGLang's CPU build (`sgl_kernel`) that EAGLE-3 calls; no package of that build exists.

Slow and plain: it shows what SGLang computes with a draft, not how fast. Kernels of one sequence's tree are pure functions on lists
(`parents_of`, `links_of`, `accepted_rows`); those that SGLang calls unpack the batch and write where they are told to. Any other kernel
raises NotImplementedError with its name. Knows nothing of models, schedulers or weights.

Axes: B sequences, T new tokens of all sequences together, H and K query and key heads, D head width, S slots of the key-value cache,
L longest text, N nodes of a tree with its root. `req_to_token` [pool, L] names the slot of each token of each row of the pool of requests;
`req_pool_indices` [B] says which row is whose. Cache positions that a kernel does not name are left alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__version__ = "0.0.0+standin"
NAMESPACE = "sgl_kernel"  # where SGLang looks for operators: torch.ops.sgl_kernel
OWN_ROWS_ONLY = 1  # TreeMaskMode.QLEN_ONLY: a mask [N, N] over the tree alone, the text before it being visible to all

# ---- attention over the cache ----


def attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """[M, H, D] from queries [M, H, D] over keys and values [N, K, D]; `visible` bool [M, N], None: all. In float32."""
    query, keys, values = (part.float().transpose(0, 1).unsqueeze(0) for part in (query, keys, values))
    return F.scaled_dot_product_attention(query, keys, values, visible, scale=scale, enable_gqa=True).squeeze(0).transpose(0, 1)


def decode_attention_cpu(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: float,
    v_scale: float,
    output: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    loc: Tensor,
    attn_logits: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    sm_scale: float,
    logit_cap: float,
    is_cross_attn: bool,
    sliding_window_size: int,
    encoder_lens: Tensor | None = None,
    sinks: Tensor | None = None,
) -> None:
    """One new token a sequence: write key and value [B, K * D] to slots `loc` [B], then attend to its `seq_lens` tokens, itself the last.

    query and `output` (written) [B, H, D], caches [S, K, D]. `attn_logits` is scratch space that this kernel does not need.
    """
    refuse_variants(k_scale, v_scale, logit_cap, is_cross_attn, sliding_window_size, sinks)
    if key is not None and value is not None:
        k_cache[loc] = key.view(-1, *k_cache.shape[1:]).to(k_cache.dtype)
        v_cache[loc] = value.view(-1, *v_cache.shape[1:]).to(v_cache.dtype)
    for row, (request, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist())):
        slots = req_to_token[request, :length].long()
        output[row] = attend(query[row : row + 1], k_cache[slots], v_cache[slots], None, sm_scale)[0].to(output.dtype)


def extend_attention_cpu(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    o: Tensor,
    k_buffer: Tensor,
    v_buffer: Tensor,
    k_scale: float,
    v_scale: float,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    extend_seq_lens: Tensor,
    extend_start_loc: Tensor,
    max_len_extend: int,
    sm_scale: float,
    logit_cap: float,
    is_cross_attn: bool,
    sliding_window_size: int,
    encoder_lens: Tensor | None = None,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    is_causal: bool = True,
) -> None:
    """Several new tokens a sequence: each sees the text before them, and of one another those before it, or those `tree_mask` says.

    q and `o` (written) [T, H, D], caches [S, K, D]; k and v [T, K * D] are the new tokens' own, None: they lie in the cache already.
    Sequence b has `seq_lens[b]` tokens, the last n = `extend_seq_lens[b]` of them new and at rows from `extend_start_loc[b]` on.
    `tree_mask`: bool, each sequence's [n, n] one after another; [i, j]: i sees j.
    """
    refuse_variants(k_scale, v_scale, logit_cap, is_cross_attn, sliding_window_size, sinks)
    begun = 0  # entries of the mask that belong to the sequences before
    lists = (req_pool_indices, seq_lens, extend_seq_lens, extend_start_loc)
    for request, length, new, start in zip(*(one.tolist() for one in lists)):
        rows, slots = slice(start, start + new), req_to_token[request, :length].long()
        keys, values = k_buffer[slots], v_buffer[slots]
        if k is not None and v is not None:
            keys[length - new :] = k[rows].view(new, *keys.shape[1:]).to(keys.dtype)
            values[length - new :] = v[rows].view(new, *values.shape[1:]).to(values.dtype)
        among_new = tree_mask.flatten()[begun : begun + new * new] if tree_mask is not None else None
        begun += new * new
        visible = visible_from(length, new, among_new, is_causal)
        o[rows] = attend(q[rows], keys, values, visible, sm_scale).to(o.dtype)


def visible_from(length: int, new: int, among_new: Tensor | None, is_causal: bool) -> Tensor:
    """bool [new, length]: what each of the last `new` tokens of a text sees of all of it."""
    visible = torch.ones(new, length, dtype=torch.bool)
    if among_new is not None:
        visible[:, length - new :] = among_new.view(new, new)
    elif is_causal:
        visible = visible.tril(length - new)
    return visible


def refuse_variants(k_scale: float, v_scale: float, logit_cap: float, is_cross_attn: bool, window: int, sinks: Tensor | None) -> None:
    """SGLang's kernels know more kinds of attention than a Llama needs."""
    wanted = {
        "a scaled cache": (k_scale, v_scale) != (1.0, 1.0),
        "capped logits": logit_cap > 0,
        "cross attention": is_cross_attn,
        "a sliding window": window > 0,
        "attention sinks": sinks is not None,
    }
    for what, asked in wanted.items():
        if asked:
            raise NotImplementedError(f"{what}: SGLang's CPU kernels have it, this stand-in does not")


# ---- slots of the cache ----


def spans(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Rows b and columns starts[b] .. ends[b] - 1, all of them in order."""
    lengths = (ends - starts).long()
    rows = torch.arange(len(lengths)).repeat_interleave(lengths)
    first = lengths.cumsum(0) - lengths
    return rows, torch.arange(len(rows)) - first[rows] + starts.long()[rows]


def assign_req_to_token_pool_cpu(
    req_pool_indices: Tensor, req_to_token: Tensor, start_offset: Tensor, end_offset: Tensor, out_cache_loc: Tensor, pool_len: int
) -> None:
    """Write slots into the table: tokens start .. end - 1 of each sequence get theirs from `out_cache_loc`, in order."""
    rows, columns = spans(start_offset, end_offset)
    req_to_token[req_pool_indices[rows].long(), columns] = out_cache_loc[: len(rows)].to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(
    req_pool_indices: Tensor, req_to_token: Tensor, start_offset: Tensor, end_offset: Tensor, out_cache_loc: Tensor, pool_len: int
) -> None:
    """Read slots from the table: those of tokens start .. end - 1 of each sequence go to `out_cache_loc`, in order."""
    rows, columns = spans(start_offset, end_offset)
    out_cache_loc[: len(rows)] = req_to_token[req_pool_indices[rows].long(), columns].to(out_cache_loc.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: Tensor, req_to_token: Tensor, seq_lens: Tensor, out_cache_loc: Tensor, pool_len: int, topk: int, num_steps: int
) -> None:
    """Read the slots of the topk * num_steps tokens behind each text: `out_cache_loc` [B * topk * num_steps]."""
    assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, seq_lens, seq_lens + topk * num_steps, out_cache_loc, pool_len)


def build_draft_decode_metadata_cpu(
    req_to_token: Tensor, req_pool_indices: Tensor, seq_lens: Tensor, topk: int, num_steps: int, pool_len: int
) -> Tensor:
    """A table [B * topk, pool_len] with a row for each branch of a draft: the text's slots, then the branch's own num_steps.

    Branch t's own are slots t * num_steps .. of those behind the text. What follows them means nothing.
    """
    columns = torch.arange(pool_len).expand(len(seq_lens) * topk, -1)
    branch = torch.arange(topk).repeat(len(seq_lens)).unsqueeze(1)
    behind = columns >= seq_lens.repeat_interleave(topk).unsqueeze(1)
    source = (columns + behind * branch * num_steps).clamp(max=pool_len - 1)
    return req_to_token[req_pool_indices.long()].repeat_interleave(topk, 0).gather(1, source)


def fill_bonus_tokens_cpu(accept_tokens: Tensor, accept_lens: Tensor, bonus_tokens: Tensor, accept_stride: int) -> None:
    """`bonus_tokens` [B]: the last accepted token of each row of `accept_tokens` [B * accept_stride], `accept_lens` [B] being accepted."""
    last = torch.arange(len(accept_lens)) * accept_stride + accept_lens.long() - 1
    bonus_tokens.copy_(accept_tokens.flatten()[last])


def fill_accept_out_cache_loc_cpu(accept_index: Tensor, out_cache_loc: Tensor, accept_out_cache_loc: Tensor) -> None:
    """The slots of accepted nodes, close together: `out_cache_loc` at those of `accept_index` that are not -1."""
    accepted = accept_index.flatten()
    accepted = accepted[accepted >= 0].long()
    accept_out_cache_loc[: len(accepted)] = out_cache_loc[accepted].to(accept_out_cache_loc.dtype)


def copy_all_layer_kv_cache_cpu(data_ptrs: Tensor, strides: Tensor, tgt_loc: Tensor, src_loc: Tensor) -> None:
    """Copy slots `src_loc` to slots `tgt_loc` in every layer's cache: at address data_ptrs[i], a slot being strides[i] bytes long.

    As if all were read before any is written.
    """
    slots = 1 + max(tgt_loc.tolist() + src_loc.tolist(), default=-1)
    for address, width in zip(data_ptrs.tolist(), strides.tolist()):
        memory = (ctypes.c_uint8 * (slots * width)).from_address(address)
        if slots:
            cache = torch.frombuffer(memory, dtype=torch.uint8).view(slots, width)
            cache[tgt_loc.long()] = cache[src_loc.long()]


# ---- trees ----


def parents_of(chosen: Sequence[int], expanded: Sequence[int], topk: int) -> list[int]:
    """Each row's parent's row; row 0 is the root (-1), row i the candidate chosen[i - 1].

    Candidates are numbered in the order they were made, topk for each expanded node: 0 .. topk - 1 follow the root, those from
    b * topk on follow candidate expanded[b]. `chosen` ascends, so parents come before children.
    """
    rows = {candidate: row for row, candidate in enumerate(chosen, 1)}
    parents = [-1]
    for candidate in chosen:
        block = candidate // topk
        parent = rows.get(expanded[block]) if block else 0
        if parent is None:
            raise ValueError(f"candidate {candidate} was chosen for the tree, its parent {expanded[block]} was not")
        parents.append(parent)
    return parents


def links_of(parents: Sequence[int]) -> tuple[list[int], list[int]]:
    """First child and next sibling of each row, -1 for none; siblings in the order of their rows."""
    first, following = [-1] * len(parents), [-1] * len(parents)
    for row in range(len(parents) - 1, 0, -1):
        following[row], first[parents[row]] = first[parents[row]], row
    return first, following


def build_tree_kernel_efficient_cpu(
    parent_list: Tensor,
    selected_index: Tensor,
    verified_seq_len: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,
) -> None:
    """Lay out each sequence's tree of N = draft_token_num rows for verification; all but the first three tensors are written.

    parent_list [B, ..] and selected_index [B, N - 1]: `expanded` and `chosen` of `parents_of`. tree_mask bool [B * N * N]: who sees whom,
    ancestors and itself; positions [B * N]: length of the text plus depth; retrive_index [B, N]: rows numbered through the batch;
    retrive_next_token and retrive_next_sibling [B, N]: `links_of`.
    """
    if tree_mask_mode != OWN_ROWS_ONLY:
        raise NotImplementedError(f"a tree mask of mode {int(tree_mask_mode)}: the CPU build is asked for {OWN_ROWS_ONLY} only")
    batch, count = len(verified_seq_len), draft_token_num
    masks, places = tree_mask.view(batch, count, count), positions.view(batch, count)
    retrive_index.copy_(torch.arange(batch * count).view(batch, count))
    masks.fill_(False)
    for b in range(batch):
        parents = parents_of(selected_index[b].tolist(), parent_list[b].tolist(), topk)
        places[b, 0] = verified_seq_len[b]
        for row, parent in enumerate(parents):
            if parent >= 0:
                masks[b, row] = masks[b, parent]
                places[b, row] = places[b, parent] + 1
            masks[b, row, row] = True
        first, following = links_of(parents)
        retrive_next_token[b], retrive_next_sibling[b] = torch.tensor(first), torch.tensor(following)


def accepted_rows(tokens: Sequence[int], first: Sequence[int], following: Sequence[int], target: Sequence[int], most: int) -> list[int]:
    """From the root down as long as a child is what the target says at its parent: rows, root first, at most `most`."""
    path = [0]
    while len(path) < most:
        row = first[path[-1]]
        while row >= 0 and tokens[row] != target[path[-1]]:
            row = following[row]
        if row < 0:
            break
        path.append(row)
    return path


def verify_tree_greedy_cpu(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Walk each sequence's tree, tokens `candidates` [B, N], along the target's own choices `target_predict` [B, N].

    Written: accept_index [B, most], the rows of the path numbered through the batch (what follows them stays); accept_token_num [B], its
    length without the root; predicts [B * N], the target's choice at each row of the path, the last of them the bonus token.
    """
    for b in range(len(candidates)):
        lists = (candidates[b], retrive_next_token[b], retrive_next_sibling[b], target_predict[b])
        path = accepted_rows(*(one.tolist() for one in lists), most=accept_index.shape[1])
        numbers = retrive_index[b, path]
        accept_index[b, : len(path)] = numbers.to(accept_index.dtype)
        accept_token_num[b] = len(path) - 1
        predicts[numbers] = target_predict[b, path].to(predicts.dtype)


# ---- what SGLang finds ----


def operators() -> Iterator[tuple[Callable[..., None], tuple[str, ...]]]:
    """Kernels that are called through torch.ops, with the tensors that they write."""
    yield decode_attention_cpu, ("k_cache", "v_cache", "output")
    yield extend_attention_cpu, ("o",)


def register(namespace: str) -> torch.library.Library:
    """Make the operators known as torch.ops.<namespace>, for as long as what is returned lives."""
    library = torch.library.Library(namespace, "DEF")
    for kernel, written in operators():
        library.define(kernel.__name__ + torch.library.infer_schema(kernel, mutates_args=written))
        library.impl(kernel.__name__, kernel, "CPU")
    return library


def __getattr__(name: str) -> Callable[..., None]:
    """SGLang imports many kernels by name that it does not call here."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"{name}: SGLang's CPU kernels have it, this stand-in does not")

    return missing


if __name__ == NAMESPACE:  # not where a test loads this file under another name
    LIBRARY = register(NAMESPACE)
