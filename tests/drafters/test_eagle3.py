"""The drafter's trees are the slow reference's, round after round, and its files are the ones engines read."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from eyas import reference
from eyas.config import PLAIN, EyasError, Sampling, TreeShape
from eyas.decode.drafter import TreeRequest
from eyas.decode.generate import Decoder
from eyas.decode.sampling import Noise
from eyas.decode.tree import Tree
from eyas.drafters import eagle3
from eyas.drafters.eagle3 import Eagle3Drafter
from eyas.files.eagle3_files import check_fits, config_from_file, config_to_file, load_draft, save_draft
from eyas.files.tensors import INDEX, read_tensors, save_tensors
from eyas.model.draft import DraftNetwork, draft_config
from eyas.model.rows import chain_rows
from eyas.model.vocab import DraftVocab
from tests.tiny import randomize, reference_weights, tiny_config, tiny_draft, tiny_target

V, H = 53, 32
TARGET = tiny_target()
SETTINGS = [{}, {"fc_norm": True}, {"norm_output": True}, {"fc_norm": True, "norm_output": True}]
GREEDY, SAMPLED = Sampling(), Sampling(0.7)


class Text:
    """What rounds would commit: random tokens, and random features of all but the last."""

    def __init__(self, seed: int, prompt: int) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.noise = Noise(seed, V)
        self.tokens: list[int] = []
        self.features = torch.zeros(0, 3 * H, dtype=torch.float64)
        self.news = self.grow(prompt + 1, prompt)

    def grow(self, tokens: int, rows: int) -> tuple[list[int], torch.Tensor]:
        drawn = torch.randint(0, V, (tokens,), generator=self.draw).tolist()
        features = torch.randn(rows, 3 * H, generator=self.draw, dtype=torch.float64)
        self.tokens, self.features = self.tokens + drawn, torch.cat([self.features, features])
        return drawn, features

    def round(self) -> tuple[list[int], torch.Tensor]:
        """One to four tokens more: an accepted path and a bonus, features of the path's rows, root included."""
        count = int(torch.randint(1, 5, (), generator=self.draw))
        return self.grow(count, count)

    def request(self, sequence: int, shape: TreeShape, sampling: Sampling) -> TreeRequest:
        noise = None if sampling.greedy else self.noise.at
        return TreeRequest(sequence, self.tokens[-1], len(self.tokens) - 1, shape, sampling, noise)


class Pair:
    """The drafter under test and the reference's weights."""

    def __init__(self, prepare: bool = True, room: int = 400, sequences: int = 1, **settings) -> None:
        self.network, self.vocab = tiny_draft(TARGET, **settings)
        self.weights, self.config = reference_weights(self.network), self.network.config
        self.drafter = Eagle3Drafter(self.network.prepare() if prepare else self.network, self.vocab)
        self.drafter.reserve(sequences, room)

    @torch.no_grad()
    def propose(self, texts: list[Text], shape: TreeShape, sampling: Sampling) -> list[Tree]:
        return self.drafter.propose([text.request(sequence, shape, sampling) for sequence, text in enumerate(texts)])

    @torch.no_grad()
    def reference_tree(self, text: Text, shape: TreeShape, sampling: Sampling) -> reference.Tree:
        """The hook: what the target will draw at a depth, by its own noise there, told in draft ids."""

        def score(log_probs_D: torch.Tensor, depth: int) -> torch.Tensor:
            noise_D = text.noise.at(len(text.tokens) - 1 + depth)[self.vocab.ids]
            return ((log_probs_D / sampling.temperature).log_softmax(-1) + noise_D).log_softmax(-1)

        hook = None if sampling.greedy else score
        return reference.grow(self.weights, self.config, text.tokens, text.features, self.vocab.ids, shape, hook)

    def check(self, text: Text, shape: TreeShape, sampling: Sampling) -> None:
        assert_same(self.propose([text], shape, sampling)[0], self.reference_tree(text, shape, sampling))


def assert_same(ours: Tree, theirs: Tree | reference.Tree) -> None:
    assert (ours.tokens, ours.parents, ours.depths) == (theirs.tokens, theirs.parents, theirs.depths)
    assert ours.scores == pytest.approx(theirs.scores, abs=1e-9)


# ---- growth ----


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_trees_are_the_references_round_after_round(settings, sampling):
    for number, shape in enumerate(("chain:1", "chain:3", "8x2x3", "20x4x5")):
        pair, text = Pair(prepare=number % 2 == 0, **settings), Text(number, prompt=1 + 4 * number)
        pair.drafter.observe(0, *text.news)
        for _ in range(3):
            pair.check(text, TreeShape.parse(shape), sampling)
            pair.drafter.observe(0, *text.round())
        pair.check(text, TreeShape.parse(shape), sampling)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=str)
def test_the_large_tree_is_the_references(sampling):
    pair, text = Pair(), Text(9, prompt=6)
    pair.drafter.observe(0, *text.news)
    pair.propose([text], TreeShape.parse("20x4x5"), sampling)
    pair.drafter.observe(0, *text.round())
    pair.check(text, TreeShape.parse("60x7x10"), sampling)


def test_asking_twice_gives_the_same_tree_once_text_was_added():
    """A proposal leaves no row behind: what was tried and rejected is not seen by the next tree."""
    pair, text = Pair(), Text(3, prompt=5)
    pair.drafter.observe(0, *text.news)
    for shape in ("20x4x5", "chain:3", "8x2x3"):
        pair.check(text, TreeShape.parse(shape), SAMPLED)
        pair.drafter.observe(0, *text.round())


@pytest.mark.parametrize("prompt", [eagle3.CATCH_UP, eagle3.CATCH_UP + 1, 2 * eagle3.CATCH_UP + 70, eagle3.HELD + 9])
def test_long_prompts_are_read_in_parts_and_give_the_references_tree(prompt):
    pair, text = Pair(room=prompt + 100), Text(prompt, prompt)
    pair.drafter.observe(0, *text.news)
    assert len(pair.drafter.pending[0].tokens) <= eagle3.HELD, "what waits is bounded"
    pair.check(text, TreeShape.parse("8x2x3"), SAMPLED)
    pair.drafter.observe(0, *text.round())
    pair.check(text, TreeShape.chain(2), GREEDY)


@pytest.mark.parametrize("asked", [False, True])
def test_empty_rounds_in_between_change_nothing(asked, monkeypatch):
    """Rounds that ask for no tree, or do not ask at all: the draft catches up when next asked."""
    for limit in (256, 4):
        monkeypatch.setattr(eagle3, "CATCH_UP", limit)
        pair, text = Pair(), Text(4, prompt=9)
        pair.drafter.observe(0, *text.news)
        for _ in range(2):
            for _ in range(5):
                if asked:
                    assert pair.propose([text], PLAIN, SAMPLED) == [Tree.root(text.tokens[-1])]
                pair.drafter.observe(0, *text.round())
            pair.check(text, TreeShape.parse("8x2x3"), SAMPLED)
            pair.drafter.observe(0, *text.round())


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=str)
def test_trees_of_a_batch_are_the_trees_alone(sampling):
    texts = [Text(seed, prompt) for seed, prompt in enumerate((1, 12, 5, 30, 2))]
    together, shape = Pair(sequences=5), TreeShape.parse("12x3x3")
    for sequence, text in enumerate(texts):
        together.drafter.observe(sequence, *text.news)
    for _ in range(3):
        trees = together.propose(texts, shape, sampling)
        for sequence, (text, tree) in enumerate(zip(texts, trees)):
            assert_same(tree, together.reference_tree(text, shape, sampling))
            together.drafter.observe(sequence, *text.round())


def test_sequences_may_ask_for_different_shapes():
    texts = [Text(seed, prompt) for seed, prompt in enumerate((3, 7, 4, 2))]
    shapes = [TreeShape.parse("12x3x3"), PLAIN, TreeShape.chain(1), TreeShape.parse("5x0x4")]
    pair = Pair(sequences=4)
    for sequence, text in enumerate(texts):
        pair.drafter.observe(sequence, *text.news)
    with torch.no_grad():
        trees = pair.drafter.propose([text.request(i, shape, GREEDY) for i, (text, shape) in enumerate(zip(texts, shapes))])
    for text, shape, tree in zip(texts, shapes, trees):
        assert_same(tree, pair.reference_tree(text, shape, GREEDY))


def test_a_forgotten_sequence_leaves_no_trace():
    pair, shape = Pair(sequences=2), TreeShape.parse("8x2x3")
    for seed in range(3):
        text, unread = Text(seed, prompt=12 - 4 * seed), Text(50 + seed, prompt=3)
        for sequence, written in enumerate((text, unread)):
            pair.drafter.observe(sequence, *written.news)
        pair.check(text, shape, SAMPLED)
        pair.drafter.observe(0, *text.round())
        pair.drafter.forget(0)
        pair.drafter.forget(1)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=str)
def test_a_round_hands_the_draft_the_features_and_positions_that_the_reference_means(sampling):
    """Against the whole text read anew: slot j pairs the target's feature at t_j with t_{j+1}, and noise is that of the token guessed."""
    network, vocab = tiny_draft(TARGET)
    weights, shape, prompts, seen = reference_weights(network), TreeShape.parse("8x2x3"), [[1, 2, 3, 4], [5], [6] * 9], []
    decoder = Decoder(TARGET, Eagle3Drafter(network, vocab))
    decoder.watch = seen.append
    *_, texts = itertools.islice(decoder.run(prompts, shape, sampling, [7, 8, 9], 60), 6)  # five rounds
    written = {text.slot: text.tokens[: text.prompt_length + 1] for text in texts}
    for record in seen:
        tokens, noise = written[record.sequence], Noise(7 + record.sequence, V)
        features = TARGET(chain_rows(0, tokens[:-1], 0), TARGET.new_cache(1, len(tokens)), network.config.taps).features

        def score(log_probs_D, depth, tokens=tokens, noise=noise):
            return ((log_probs_D / 0.7).log_softmax(-1) + noise.at(len(tokens) - 1 + depth)[vocab.ids]).log_softmax(-1)

        with torch.no_grad():
            theirs = reference.grow(weights, network.config, tokens, features, vocab.ids, shape, None if sampling.greedy else score)
        assert_same(record.tree, theirs)
        tokens += record.committed
    assert len(seen) == 15


def test_a_tree_says_only_tokens_of_the_draft_vocabulary():
    pair, text = Pair(draft_vocab_size=6), Text(1, prompt=5)
    pair.drafter.observe(0, *text.news)
    tree = pair.propose([text], TreeShape.parse("60x7x10"), SAMPLED)[0]
    assert set(tree.tokens[1:]) <= set(pair.vocab.ids.tolist())
    assert max(map(len, tree.children)) <= 6 < len(tree)


# ---- taps ----


def test_fc_reads_low_middle_and_high_side_by_side():
    network, _ = tiny_draft(TARGET)
    features = torch.randn(4, 3 * H, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for third in range(3):
        columns = slice(third * H, (third + 1) * H)
        changed = features.clone()
        changed[:, columns] += 1
        moved = network.fuse(changed) - network.fuse(features)
        assert torch.allclose(moved, network.fc.weight[:, columns].sum(1).expand(4, H), atol=1e-12)


def test_fc_norm_norms_each_third_on_its_own():
    network, _ = tiny_draft(TARGET, fc_norm=True)
    features = torch.randn(4, 3 * H, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(network.fuse(features), reference.fuse(reference_weights(network), network.config, features), atol=1e-12)
    louder = features * torch.tensor([3.0, 50.0, 7.0], dtype=torch.float64).repeat_interleave(H)
    assert torch.allclose(network.fuse(louder), network.fuse(features), atol=1e-3), "each feature's loudness is taken out"


def test_the_thirds_are_the_inputs_of_the_tapped_layers_in_layer_order():
    drafter = Eagle3Drafter(*tiny_draft(TARGET))
    assert drafter.wants == (1, 2, 4)
    tokens = [3, 1, 4, 1, 5]

    def features(taps):
        return TARGET(chain_rows(0, tokens, 0), TARGET.new_cache(1, 5), taps).features

    assert torch.equal(features((1, 2, 4)), torch.cat([features((tap,)) for tap in (1, 2, 4)], -1))
    assert torch.equal(features((0,)), TARGET.model.embed_tokens.weight[torch.tensor(tokens)]), "the first layer reads the embedding"


# ---- files ----

PUBLISHED = {
    "fc.weight",
    "midlayer.hidden_norm.weight",
    "midlayer.input_layernorm.weight",
    "midlayer.self_attn.q_proj.weight",
    "midlayer.self_attn.k_proj.weight",
    "midlayer.self_attn.v_proj.weight",
    "midlayer.self_attn.o_proj.weight",
    "midlayer.post_attention_layernorm.weight",
    "midlayer.mlp.gate_proj.weight",
    "midlayer.mlp.up_proj.weight",
    "midlayer.mlp.down_proj.weight",
    "norm.weight",
    "lm_head.weight",
}
ENGINE_KEYS = {  # what SafeAILab, SGLang and vLLM read, with the only value that all of them take rightly
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "vocab_size": V,
    "draft_vocab_size": 29,
    "hidden_size": H,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
    "fc_norm": False,
    "norm_output": False,
}


@pytest.fixture
def saved(tmp_path):
    """A saved draft, and what it was made from."""
    network, vocab = tiny_draft(TARGET)
    save_draft(tmp_path, network, vocab, TARGET.config.num_hidden_layers)
    return tmp_path, network, vocab


def embedding() -> torch.Tensor:
    return TARGET.model.embed_tokens.weight


def rewrite(directory, change) -> None:
    """Change the tensors of a saved draft."""
    from safetensors.torch import save_file

    tensors = read_tensors(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_weights_bear_the_published_names():
    assert set(tiny_draft(TARGET)[0].state_dict()) == PUBLISHED, "the embedding is the target's and never saved"
    assert set(tiny_draft(TARGET, fc_norm=True)[0].state_dict()) == PUBLISHED | {f"fc_norm.{k}.weight" for k in range(3)}


@pytest.mark.parametrize("largest_file", [None, 4000])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_was_saved_is_loaded(tmp_path, settings, largest_file):
    network, vocab = tiny_draft(TARGET, **settings)
    save_draft(tmp_path, network, vocab, 5)
    if largest_file:  # as the bundled draft lies
        tensors = read_tensors(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        save_tensors(tmp_path, tensors, largest_file)
    assert (tmp_path / INDEX).exists() == (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(largest_file)
    loaded, its_vocab = load_draft(tmp_path, embedding(), torch.float64)
    assert loaded.config == network.config
    assert torch.equal(its_vocab.ids, vocab.ids) and its_vocab.vocab_size == V
    assert loaded.state_dict().keys() == network.state_dict().keys()
    for name, weight in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.bfloat16().double()), name
    assert loaded.embedding[0] is embedding()


def test_the_file_holds_an_offset_table_and_a_mask_that_agree(saved):
    directory, _, vocab = saved
    tensors = read_tensors(directory)
    assert set(tensors) == PUBLISHED | {"d2t", "t2d"}
    assert (tensors["d2t"].dtype, tuple(tensors["d2t"].shape)) == (torch.int64, (29,))
    assert (tensors["t2d"].dtype, tuple(tensors["t2d"].shape)) == (torch.bool, (V,))
    assert torch.equal(tensors["d2t"] + torch.arange(29), vocab.ids)
    assert torch.equal(tensors["t2d"].nonzero()[:, 0], vocab.ids)
    assert {tensor.dtype for name, tensor in tensors.items() if name in PUBLISHED} == {torch.bfloat16}
    assert torch.equal(vocab.to_target(torch.arange(29)), vocab.ids)
    assert vocab.member().tolist() == tensors["t2d"].tolist()


def test_offsets_taken_for_ids_and_ids_taken_for_offsets_are_refused(saved):
    directory, _, vocab = saved
    offsets = vocab.as_tensors()["d2t"]
    with pytest.raises(EyasError, match="is d2t an offset table"):
        DraftVocab(offsets, V)
    rewrite(directory, lambda tensors: tensors.update(d2t=vocab.ids.clone()))
    with pytest.raises(EyasError, match="ascending target ids below 53"):
        load_draft(directory, embedding(), torch.float64)
    low = DraftVocab([0, 1, 2, 5], V)  # ids small enough to look like offsets: the mask tells
    with pytest.raises(EyasError, match="d2t and t2d of this draft name different tokens"):
        DraftVocab.from_tensors({"d2t": low.ids, "t2d": low.member()}, V)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("fc.weight"), "missing fc.weight"),
        (lambda tensors: tensors.pop("d2t"), "missing d2t"),
        (lambda tensors: tensors.pop("t2d"), "missing t2d"),
        (lambda tensors: tensors.update({"layers.0.mlp.up_proj.weight": torch.zeros(2)}), "unknown layers.0.mlp.up_proj.weight"),
        (lambda tensors: tensors.update({"fc_norm.0.weight": torch.zeros(H)}), "unknown fc_norm.0.weight"),
        (lambda tensors: tensors.update({"norm.weight": torch.zeros(H + 1)}), r"norm.weight is \(33,\), expected \(32,\)"),
    ],
)
def test_a_tensor_that_is_missing_unknown_or_misshapen_is_named(saved, change, words):
    rewrite(saved[0], change)
    with pytest.raises(EyasError, match=words):
        load_draft(saved[0], embedding(), torch.float64)


def test_several_problems_are_all_listed(saved):
    rewrite(saved[0], lambda tensors: [tensors.pop("fc.weight"), tensors.pop("norm.weight"), tensors.update(extra=torch.zeros(1))])
    with pytest.raises(EyasError) as refused:
        load_draft(saved[0], embedding(), torch.float64)
    assert all(words in str(refused.value) for words in ("missing fc.weight", "missing norm.weight", "unknown extra"))


def test_the_config_says_what_engines_read(saved):
    written = json.loads((saved[0] / "config.json").read_text())
    assert {key: written.get(key, "absent") for key in ENGINE_KEYS} == ENGINE_KEYS
    assert "target_hidden_size" not in written, "SafeAILab takes its presence for: the embedding is in this file"
    assert written["max_position_embeddings"] >= TARGET.config.max_position_embeddings
    assert config_from_file(saved[0]) == saved[1].config


def test_taps_other_than_the_default_are_written_in_both_spellings(saved):
    written = json.loads((saved[0] / "config.json").read_text())
    assert written["eagle_aux_hidden_state_layer_ids"] == [1, 2, 4], "vLLM: the layers whose input is read"
    assert written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 3], "SGLang: the layers whose output is read"
    assert written["eagle_config"]["use_aux_hidden_state"] is True
    default = config_to_file(draft_config(tiny_config(num_hidden_layers=8), 29), 8)
    assert default["eyas"]["taps_are_inputs_of_layers"] == [2, 4, 5]
    assert not [key for key in default if key.startswith("eagle_")], "without ids both engines take the default, and agree"


def test_scaled_rotary_embeddings_come_back_as_they_were(tmp_path):
    scaling = {"rope_type": "linear", "factor": 2.0}
    network = DraftNetwork(draft_config(tiny_config(rope_scaling=scaling, rope_theta=5e5), 29, (1, 2, 4)), embedding()).double()
    randomize(network)
    save_draft(tmp_path, network, DraftVocab(range(29), V), 5)
    assert json.loads((tmp_path / "config.json").read_text())["rope_parameters"] == {**scaling, "rope_theta": 5e5}
    assert config_from_file(tmp_path) == network.config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 40}, "hidden size 32 against the target's 40"),
        ({"vocab_size": 54}, "vocabulary 53 against the target's 54"),
        ({"num_hidden_layers": 4}, r"taps \(1, 2, 4\) of a target with 4 layers"),
    ],
)
def test_a_draft_for_another_target_is_refused_with_what_differs(changes, words):
    config = tiny_draft(TARGET)[0].config
    check_fits(config, TARGET.config)
    with pytest.raises(EyasError, match=words) as refused:
        check_fits(config, replace(TARGET.config, **changes))
    assert "\n" not in str(refused.value) and str(refused.value).endswith("use the matching draft")


def test_a_directory_that_is_no_draft_of_eyas_is_refused(tmp_path):
    with pytest.raises(EyasError, match=r"config.json does not exist"):
        load_draft(tmp_path, embedding(), torch.float64)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(EyasError, match="lacks draft_vocab_size or eyas"):
        load_draft(tmp_path, embedding(), torch.float64)


def test_a_vocabulary_of_another_size_than_the_config_says_is_refused(saved):
    directory, _, vocab = saved
    shorter = DraftVocab(vocab.ids[:-1], V).as_tensors()
    rewrite(directory, lambda tensors: tensors.update(shorter))
    with pytest.raises(EyasError, match="d2t names 28 tokens, its config 29"):
        load_draft(directory, embedding(), torch.float64)


def test_a_config_that_lacks_a_key_names_it(saved):
    directory, _, _ = saved
    config = json.loads((directory / "config.json").read_text())
    del config["intermediate_size"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(EyasError, match="intermediate_size"):
        load_draft(directory, embedding(), torch.float64)
