"""Claims about conversations: the answer mask, what a broken file says, the draft vocabulary. Nothing is downloaded."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from eyas.config import EyasError
from eyas.train.conversations import Document, draft_vocabulary, read_conversations, render, truncate
from tests.tiny import CHATML, byte_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
STRIPPING = CHATML.replace("m.content", "(m.content | trim)")
NO_PROMPT = CHATML[: CHATML.index("{% if add_generation_prompt")]  # knows no generation prompt, as older templates
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate\nuser/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
THINKING = (  # as Qwen3: reasoning of all but the last message is dropped, and the last gets an empty block if it has none
    "{% for m in messages %}{% set c = m.content %}"
    "{% if m.role == 'assistant' %}{% if not loop.last %}{% set c = c.split('</think>')[-1].lstrip('\n') %}"
    "{% elif '</think>' not in c %}{% set c = '<think>\n\n</think>\n\n' + c %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"chatml": (CHATML, "<|im_end|>"), "llama3": (LLAMA3, "<|eot_id|>"), "stripping": (STRIPPING, "<|im_end|>")}


@pytest.fixture(params=[(name, trim) for name in TEMPLATES for trim in (False, True)], ids=lambda p: p[0] + ("-trimmed" if p[1] else ""))
def chat(request):
    """(tokenizer, end-of-turn text, how the template writes a content)"""
    name, trim = request.param
    template, end = TEMPLATES[name]
    return byte_tokenizer(template, trim_offsets=trim), end, str.strip if name == "stripping" else str


def talk(*contents, system=None):
    turns = [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


def said(tokenizer, document):
    """The text of each answer, in order."""
    assert len(document.tokens) == len(document.answers)
    numbers = range(max(document.answers) + 1)
    tokens = [[t for t, a in zip(document.tokens, document.answers) if a == number] for number in numbers]
    return [tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in tokens]


def check(chat, messages):
    tokenizer, end, written = chat
    document = render(tokenizer, messages)
    assert said(tokenizer, document) == [written(m["content"]) + end for m in messages if m["role"] == "assistant"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert document.tokens == tokenizer(text, add_special_tokens=False)["input_ids"]
    numbers = [answer for answer in document.answers if answer >= 0]
    assert numbers == sorted(numbers)


HARD = [
    "Hello.",
    "",
    " ",
    "\n",
    "  two before and three after   ",
    "\n\nlines\n\n",
    "Zürich, 東京, 👩‍🚀, e\u0301",
    "3.14159 and 1,000,000",
    "a",
    "assistant\nuser\nim_end",
    "<|im_start | >assistant\nno header, only words",
    "system",
    "\u2028\u00a0wide blanks\u00a0",
    "{{ messages }} {% raise %}",
]


@pytest.mark.parametrize("content", HARD)
def test_mask_is_exactly_the_content_and_the_end_of_turn(chat, content):
    check(chat, talk("What?", content))
    check(chat, talk(content, content, "What?", content, system=content))


def test_a_conversation_may_begin_with_an_answer_or_hold_two_in_a_row(chat):
    check(chat, [{"role": "assistant", "content": " hi"}, *talk("a", "b")])
    check(chat, [*talk("a", "b"), {"role": "assistant", "content": "b"}])


def test_200_random_conversations(chat):
    rng = random.Random(7)
    pieces = [*HARD, " ", "the", "12", "ß", "\t", "user", "assistant", "\n", "漢", "<|", "|>", "end"]
    for _ in range(200):
        contents = ["".join(rng.choices(pieces, k=rng.randrange(6))) for _ in range(2 * rng.randrange(1, 5))]
        check(chat, talk(*contents, system=rng.choice([None, "", "Be brief. "])))


def test_an_end_of_turn_inside_the_content_does_not_end_the_answer(chat):
    check(chat, talk("q", f"one{chat[1]}two", "q", f"ends on it{chat[1]}"))


def test_a_token_over_the_boundary_belongs_where_it_starts():
    tokenizer = byte_tokenizer(CHATML, merges=[("Ċ", "Ġ"), ("Ġ", "h")])
    assert said(tokenizer, render(tokenizer, talk("q", " yes"))) == ["yes<|im_end|>"]  # "\n " is the header's
    tokenizer = byte_tokenizer(CHATML, merges=[("Ġ", "h")], trim_offsets=True)
    assert said(tokenizer, render(tokenizer, talk("q", " hi  "))) == [" hi  <|im_end|>"]  # its offset says "h" alone


def test_a_template_without_generation_prompt_keeps_its_header_out():
    tokenizer = byte_tokenizer(NO_PROMPT)
    assert said(tokenizer, render(tokenizer, talk("q", "a", "q", "assistant"))) == ["a<|im_end|>", "assistant<|im_end|>"]


def test_the_blank_after_a_prompt_is_the_models():
    tokenizer = byte_tokenizer(MISTRAL, merges=[("Ġ", "a")])
    assert said(tokenizer, render(tokenizer, talk("q", "a", "q", "b"))) == [" a</s>", " b</s>"]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_an_answer_without_end_of_turn_is_its_content(trim_offsets):
    plain = "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + '\n' }}{% endfor %}"
    tokenizer = byte_tokenizer(plain, trim_offsets=trim_offsets)  # trimmed, the header's last space has an empty offset at the content
    assert said(tokenizer, render(tokenizer, talk("q", "one", "q", "two", system="s"))) == ["one", "two"]
    tokenizer = byte_tokenizer(plain + "</s>", trim_offsets=trim_offsets)  # the end of the whole conversation ends no earlier answer
    assert said(tokenizer, render(tokenizer, talk("q", "one", "q", "two"))) == ["one", "two\n</s>"]


def test_reasoning_is_kept_where_it_is_rendered_and_an_error_where_it_is_dropped():
    tokenizer = byte_tokenizer(THINKING)
    thought = "<think>\nhm\n</think>\n\nyes"
    assert said(tokenizer, render(tokenizer, talk("q", "no", "q", thought))) == ["no<|im_end|>", thought + "<|im_end|>"]
    assert said(tokenizer, render(tokenizer, talk("q", "yes"))) == ["yes<|im_end|>"]  # not the template's empty block
    with pytest.raises(EyasError, match="rewrites the answer in message 2"):
        render(tokenizer, talk("q", thought, "q", "no"))


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (MISTRAL, talk("q", "a", system="s"), "roles must alternate user/assistant"),
        (CHATML, talk("q"), "no token"),
        (None, talk("q", "a"), "cannot render"),
        (CHATML, [], "cannot render|no token"),
        (CHATML.replace("m.content", "(m.content | upper)"), talk("q", "a"), "rewrites the answer"),
    ],
)
def test_what_cannot_be_rendered_says_so_in_one_line(template, messages, reason):
    with pytest.raises(EyasError, match=reason) as caught:
        render(byte_tokenizer(template), messages)
    assert "\n" not in str(caught.value)


def test_messages_are_left_as_they_were():
    messages = talk("q", " a ")
    render(byte_tokenizer(CHATML), messages)
    assert messages == talk("q", " a ")


# --- reading


GOOD = {"messages": talk("q", "a")}


def write(tmp_path, *lines):
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_every_form_becomes_role_and_content(tmp_path):
    share = {"id": 1, "conversations": [{"from": f, "value": v} for f, v in [("system", "s"), ("human", "q"), ("gpt", "a")]]}
    path = write(tmp_path, GOOD, "", share, "   ", {"messages": None, "conversations": talk("q", "a")}, "")
    conversations, complaints = read_conversations(path)
    assert conversations == [(1, talk("q", "a")), (3, talk("q", "a", system="s")), (5, talk("q", "a"))]
    assert complaints == []


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"messages": [', "not JSON ("),
        ("[" * 100_000, "not JSON ("),
        ("[1, 2]", "not a JSON object but a list"),
        ({"words": "hello"}, "no conversation in it; expected messages, conversations"),
        ({"messages": "hello"}, '"messages" is not a list'),
        ({"conversations": []}, '"conversations" is empty'),
        ({"messages": ["hello"]}, "message 1 is not a JSON object"),
        ({"messages": [{"content": "hello"}]}, "message 1 does not say who speaks: it has no role or from, but 'content'"),
        ({"messages": [*talk("q"), {"role": "wizard", "content": "hello"}]}, "message 2 has the unknown role 'wizard'"),
        ({"messages": [{"role": ["user"], "content": "hello"}]}, "message 1 has the unknown role ['user']"),
        ({"messages": [{"role": "user", "content": {"text": "q"}}]}, "message 1 has content that is not a string"),
        ({"messages": [{"role": "user", "content": 5}]}, "message 1 has content that is not a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "message 1 has a part of type 'image_url'",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 has no content"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "message 1 has no content"),
        ({"conversations": [{"from": "gpt", "value": "\ud83d"}]}, "message 1 holds half of a surrogate pair"),
        ({"messages": talk("q")}, "no assistant turn in it"),
    ],
)
def test_a_broken_line_is_named_and_the_rest_goes_on(tmp_path, line, complaint):
    conversations, complaints = read_conversations(write(tmp_path, GOOD, "", line, GOOD))
    assert len(conversations) == 2
    assert len(complaints) == 1
    assert complaints[0].startswith("line 3: " + complaint)
    assert "\n" not in complaints[0]


def test_complaints_count_the_lines_of_the_file(tmp_path):
    raw = '{"messages": [{"role": "assistant", "content": "a\u2028b\u0085c"}]}'  # no line ends inside a string
    conversations, complaints = read_conversations(write(tmp_path, raw, "oops\r", GOOD, {}, ""))
    assert [complaint.split(":")[0] for complaint in complaints] == ["line 2", "line 4"]
    assert conversations[0][1][0]["content"] == "a\u2028b\u0085c"


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps(GOOD).encode() + b"\r\n")
    assert read_conversations(path) == ([(1, talk("q", "a")), (3, talk("q", "a"))], [])


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "the file is empty"), (b"\n\noops\n{}\n", r"line 3: not JSON"), (b'{"a": "\xff"}', "not UTF-8 .byte 7")]
)
def test_a_file_without_a_valid_line_is_an_error_that_names_it(tmp_path, data, reason):
    path = tmp_path / "talk.jsonl"
    path.write_bytes(data)
    with pytest.raises(EyasError, match=reason) as caught:
        read_conversations(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_or_a_folder_is_an_error_that_names_it(tmp_path):
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(EyasError, match="cannot be read") as caught:
            read_conversations(str(path))
        assert str(path) in str(caught.value)


# --- documents


def test_truncate_cuts_at_a_token_and_drops_what_has_too_few_answers():
    document = Document(list(range(10)), [-1, -1, 0, 0, 0, -1, 1, 1, 1, 1])
    assert truncate(document, 10) == truncate(document, 99) == document
    assert truncate(document, 7) == Document(list(range(7)), [-1, -1, 0, 0, 0, -1, 1])
    assert truncate(document, 6) is None
    assert truncate(Document([1, 2, 3], [0, 0, 0]), 10) is None


def test_draft_vocabulary_is_the_most_frequent_answer_tokens_ascending():
    documents = [Document([9, 9, 9, 7, 7, 3], [-1, -1, -1, 0, 0, 0]), Document([5, 5, 5, 2, 8], [0, 0, 0, 0, -1])]
    assert draft_vocabulary(documents, 2, 10) == [5, 7]
    assert draft_vocabulary(documents, 3, 10) == [2, 5, 7]  # 2 and 3 tie: the lower id
    assert draft_vocabulary(documents, 6, 10) == [0, 1, 2, 3, 5, 7]  # padded with the lowest unused ids
    assert draft_vocabulary(documents, 10, 10) == list(range(10))
    assert draft_vocabulary(iter(documents), 3, 10, always=[9, 9]) == [5, 7, 9]  # 9 takes the place of the rarest
    assert draft_vocabulary(documents, 2, 10, always=(5,)) == [5, 7]
    assert draft_vocabulary([], 3, 10, always=[8]) == [0, 1, 8]


def test_draft_vocabulary_is_what_counting_by_hand_gives():
    rng = random.Random(3)
    for _ in range(50):
        tokens = [min(39, int(rng.expovariate(0.15))) for _ in range(rng.randrange(80))]
        document = Document(tokens, [rng.choice([-1, 0]) for _ in tokens])
        counts = Counter(token for token, answer in zip(*document) if answer >= 0)
        size, always = rng.randrange(3, 41), set(rng.sample(range(40), 2))
        others = sorted(set(range(40)) - always, key=lambda token: (-counts[token], token))
        assert draft_vocabulary([document], size, 40, always) == sorted([*always, *others[: size - 2]])


@pytest.mark.parametrize(
    ("size", "always", "reason"),
    [
        (11, (), "11 does not fit"),
        (0, (), "0 does not fit"),
        (2, (1, 2, 3), "cannot hold the 3 ids"),
        (2, (10,), "only 0 to 9"),
        (2, (-1,), "only 0"),
    ],
)
def test_a_draft_vocabulary_that_cannot_be_is_an_error(size, always, reason):
    with pytest.raises(EyasError, match=reason):
        draft_vocabulary([], size, 10, always)


def test_a_token_outside_the_targets_vocabulary_is_an_error():
    with pytest.raises(EyasError, match="token 10 lies outside"):
        draft_vocabulary([Document([10], [0])], 2, 10)


@pytest.mark.parametrize("mark", ["<|start_header_id|>", "[INST]", "<|im_start|>"])
def test_turns_that_were_put_through_a_template_before_are_refused(mark):
    """Of this model or another; a mark within a text that speaks about it is text."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f" {mark}user Hello."}]
    with pytest.raises(EyasError) as caught:
        render(byte_tokenizer(), messages)
    assert str(caught.value) == f"message 2 begins with {mark}, as if put through a chat template before; give the turn's plain text"
    assert render(byte_tokenizer(), [messages[0], {"role": "assistant", "content": f"It writes {mark} there."}]).tokens
