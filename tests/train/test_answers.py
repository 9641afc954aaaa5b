"""Claims about what is taught: tools, calls, thoughts and marks stand in the tokens as a server renders them, or it is refused.

The templates are those of well-known families, cut down to what they do with these fields.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyas.config import EyasError
from eyas.files.chat_data import Conversation, messages_of
from eyas.train.conversations import causes, documents, read_conversations, render
from tests.tiny import CHATML, PARTS, byte_tokenizer

QWEN = (  # 2.5: arguments go through tojson, so they must be objects; a tool's turn is a user's
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n'
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEEPSEEK = (  # V3: arguments are joined to strings
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}"
    "{% elif m.role == 'assistant' and m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ '<|assistant|>CALLS' + c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}{% endfor %}</s>"
    "{% elif m.role == 'assistant' %}{{ '<|assistant|>' + m.content + '</s>' }}"
    "{% elif m.role == 'tool' %}{{ 'OUTPUT' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MISTRAL = (  # no generation prompt; the tools stand before the last user turn
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and (loop.last or messages[loop.index0 + 1:] | selectattr('role', 'equalto', 'user') | list | length == 0) %}"
    "[TOOLS] {{ tools | tojson }}[/TOOLS]{% endif %}[INST] {{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}]</s>"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
QWEN3 = (  # thoughts in a field or in the content; those before the last question are dropped
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ content }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1 = (  # the prompt opens the thoughts; no turn ever shows them
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|assistant|>' + m.content.split('</think>')[-1] + '</s>' }}"
    "{% else %}{{ '<|user|>' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
FIELD = CHATML.replace(
    "m.content +", "('<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' if m.role == 'assistant' else '') + m.content +"
)
NEMO = (  # the system message stands in the last question, and there only while it asks for an answer
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}{% else %}"
    "{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
TEXT, OBJECT = '{"city": "Ulm", "days": 2}', {"city": "Ulm", "days": 2}


def user(content):
    return {"role": "user", "content": content}


def told(content, thought=None):
    return {"role": "assistant", "content": content} | ({"reasoning_content": thought} if thought else {})


def calling(arguments, content=None):
    call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def taught(tokenizer, document):
    numbers = range(max(document.answers) + 1)
    tokens = [[t for t, a in zip(document.tokens, document.answers) if a == number] for number in numbers]
    return [tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in tokens]


# ---- tools ----


@pytest.mark.parametrize("arguments", [TEXT, OBJECT], ids=["text", "object"])
@pytest.mark.parametrize(
    ("template", "call"),
    [
        (QWEN, '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm", "days": 2}}\n</tool_call><|im_end|>'),
        (DEEPSEEK, 'CALLSweather\n```json\n{"city": "Ulm", "days": 2}\n```</s>'),
        (MISTRAL, '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Ulm", "days": 2}}]</s>'),
    ],
    ids=["qwen", "deepseek", "mistral"],
)
def test_a_call_is_learned_as_the_template_writes_it_with_its_arguments_as_json(template, call, arguments):
    """However the row spells them: each template takes the spelling that it was made for."""
    tokenizer = byte_tokenizer(template)
    talk = Conversation([user("Weather?"), calling(arguments), {"role": "tool", "content": "12 C"}, told("It is 12.")])
    first, last = taught(tokenizer, render(tokenizer, talk))
    assert first == call and last.strip() in ("It is 12.<|im_end|>", "It is 12.</s>")


@pytest.mark.parametrize("arguments", ["{}", {}], ids=["text", "object"])
def test_a_call_without_arguments_is_no_text_within_json(arguments):
    (answer,) = taught(byte_tokenizer(QWEN), render(byte_tokenizer(QWEN), [user("Weather?"), calling(arguments)]))
    assert answer == '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize("arguments", [TEXT, OBJECT], ids=["text", "object"])
def test_arguments_are_never_as_python_writes_them(arguments):
    tokenizer = byte_tokenizer(QWEN.replace(" | tojson }}}\n", " }}}\n"))
    (answer,) = taught(tokenizer, render(tokenizer, [user("Weather?"), calling(arguments)]))
    assert answer == '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm", "days": 2}}\n</tool_call><|im_end|>'


def test_the_header_of_a_template_without_generation_prompt_is_no_part_of_a_call():
    tokenizer = byte_tokenizer(QWEN[: QWEN.index("{% if add_generation_prompt")])
    (answer,) = taught(tokenizer, render(tokenizer, [user("Weather?"), calling(TEXT)]))
    assert answer.strip().startswith("<tool_call>")


def test_tools_on_offer_stand_in_the_tokens_and_are_no_answer():
    tokenizer = byte_tokenizer(QWEN)
    talk = messages_of({"tools": TOOLS, "messages": [user("Hi"), told("Good day.")]})
    document = render(tokenizer, talk)
    assert tokenizer.decode(document.tokens) == tokenizer.apply_chat_template(list(talk), tools=TOOLS, tokenize=False)
    assert "weather" in tokenizer.decode(document.tokens) and taught(tokenizer, document) == ["Good day.<|im_end|>"]


def test_text_beside_a_call_is_part_of_the_answer():
    tokenizer = byte_tokenizer(QWEN)
    (answer,) = taught(tokenizer, render(tokenizer, [user("Weather?"), calling(TEXT, "Let me look.")]))
    assert answer.startswith("Let me look.<tool_call>") and answer.endswith("</tool_call><|im_end|>")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tools": TOOLS, "messages": [user("Hi"), told("Good day.")]}, "does not show tools"),
        ({"messages": [user("Weather?"), calling(TEXT, "Let me look."), user("So?"), told("12.")]}, "does not show tool calls"),
        ({"messages": [user("Weather?"), calling(TEXT, "Let me look.")]}, "does not show tool calls"),
        ({"messages": [user("Weather?"), calling({}, "Let me look.")]}, "does not show tool calls"),
    ],
)
def test_what_a_template_cannot_say_is_refused(row, reason):
    with pytest.raises(EyasError, match=f"the chat template {reason}"):
        documents(byte_tokenizer(CHATML), messages_of(row))


@pytest.mark.parametrize("arguments", [TEXT, OBJECT], ids=["text", "object"])
def test_a_template_that_shows_a_call_without_its_arguments_does_not_show_it(arguments):
    tokenizer = byte_tokenizer(QWEN.replace(', "arguments": {{ c.function.arguments | tojson }}', ""))
    with pytest.raises(EyasError, match="does not show tool calls"):
        documents(tokenizer, [user("Weather?"), calling(arguments)])


def test_a_role_that_a_template_passes_over_is_refused():
    silent = "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    with pytest.raises(EyasError, match="does not show a message of role system"):
        documents(byte_tokenizer(silent), [{"role": "system", "content": "Be brief."}, user("q"), told("a")])


def test_a_speakers_name_is_shown_or_the_conversation_is_refused():
    naming = byte_tokenizer(CHATML.replace("m.role +", "(m.name or m.role) +"))
    for talk in ([{**user("Hi"), "name": "alice"}, told("Good day.")], [user("Hi"), {**told("Good day."), "name": "alice"}]):
        assert "alice" in naming.decode(render(naming, talk).tokens)
        with pytest.raises(EyasError, match="does not show who speaks by name"):
            render(byte_tokenizer(CHATML), talk)
    tool = [user("Weather?"), calling(TEXT), {"role": "tool", "content": "12 C", "name": "weather"}, told("It is 12.")]
    assert render(byte_tokenizer(QWEN), tool).tokens  # its call names it


def test_a_developer_is_the_system_unless_the_template_knows_better():
    talk = [{"role": "developer", "content": "Be brief."}, user("q"), told("a")]
    plain, knowing = byte_tokenizer(CHATML), byte_tokenizer(CHATML + "{# developer #}")
    naming = byte_tokenizer(
        "{% for m in messages %}{% if m.role != 'developer' %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    assert "<|im_start|>system\nBe brief." in naming.decode(render(naming, talk).tokens)  # names it, and does not show it
    assert "<|im_start|>system\nBe brief." in plain.decode(render(plain, talk).tokens)
    assert "<|im_start|>developer\nBe brief." in knowing.decode(render(knowing, talk).tokens)


# ---- thoughts ----


@pytest.mark.parametrize("answer", [told("Yes.", "hm"), told("<think>\nhm\n</think>\n\nYes.")], ids=["field", "content"])
@pytest.mark.parametrize("template", [QWEN3, R1], ids=["qwen3", "r1"])
def test_thoughts_are_learned_turn_by_turn_as_they_were_served(template, answer):
    """A document for each turn whose thoughts the template drops later; each begins with the prompt that the target read."""
    tokenizer = byte_tokenizer(template)
    talk = [user("one"), answer, user("two"), answer]
    found = documents(tokenizer, talk)
    opened = "" if template == R1 else "<think>\n"
    assert [taught(tokenizer, document) for document in found] == [
        [f"{opened}hm\n</think>\n\nYes.{'</s>' if template == R1 else '<|im_end|>'}"] for _ in range(2)
    ]
    for document, turn in zip(found, (1, 3)):
        begin = next(place for place, number in enumerate(document.answers) if number >= 0)
        prompt = tokenizer.apply_chat_template(talk[:turn], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(document.tokens[:begin]) == prompt
    with pytest.raises(EyasError, match="rewrites the answer in message 2 once others follow; this takes 2 documents"):
        render(tokenizer, talk)


def test_turns_without_thoughts_share_a_document_with_what_follows():
    tokenizer = byte_tokenizer(QWEN3)
    talk = [user("one"), told("A."), user("two"), told("B.", "hm"), user("three"), told("C."), user("four"), told("D.", "so")]
    found = [taught(tokenizer, document) for document in documents(tokenizer, talk)]
    assert found == [["A.<|im_end|>", "<think>\nhm\n</think>\n\nB.<|im_end|>"], ["C.<|im_end|>", "<think>\nso\n</think>\n\nD.<|im_end|>"]]


def test_thoughts_that_the_template_cannot_show_are_refused():
    for template in (CHATML, R1.replace("<think>\n", "</think>")):  # the second asks for an answer without thoughts
        with pytest.raises(EyasError, match="rewrites the answer in message 2"):
            documents(byte_tokenizer(template), [user("q"), told("a", "hm")])


@pytest.mark.parametrize("answer", [told("Yes.", "hm"), told("<think>\nhm\n</think>\n\nYes.")], ids=["field", "content"])
def test_thoughts_in_the_content_are_moved_to_the_field_that_a_template_reads(answer):
    tokenizer = byte_tokenizer(FIELD)
    document = render(tokenizer, [user("q"), answer])
    assert taught(tokenizer, document) == ["<think>\nhm\n</think>\n\nYes.<|im_end|>"]
    assert tokenizer.decode(document.tokens).count("<think>") == 1
    assert taught(tokenizer, render(tokenizer, [user("q"), told("Yes.")])) == ["Yes.<|im_end|>"]


def test_a_rows_own_template_variables_are_used():
    tokenizer = byte_tokenizer("{{ mood }}" + CHATML)
    talk = messages_of({"chat_template_kwargs": {"mood": "calm"}, "messages": [user("q"), told("a")]})
    document = render(tokenizer, talk)
    assert taught(tokenizer, document) == ["a<|im_end|>"] and tokenizer.decode(document.tokens).startswith("calm")


def test_an_empty_reasoning_block_is_the_templates_before_a_call_as_before_an_answer():
    block = "<|im_start|>assistant\n{% if not m.reasoning_content %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content }}"
    said = QWEN[QWEN.index("{% for c in") : QWEN.index("{% endif %}{% endfor %}{% if add")]
    other = "{% if m.role != 'assistant' %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% else %}"
    tokenizer = byte_tokenizer("{% for m in messages %}" + other + block + said + QWEN[QWEN.index("{% endif %}{% endfor %}{% if add") :])
    document = render(tokenizer, [user("Weather?"), calling(TEXT), {"role": "tool", "content": "12 C"}, told("It is 12.")])
    first, last = taught(tokenizer, document)
    assert first.startswith("<tool_call>") and last == "It is 12.<|im_end|>"
    assert tokenizer.decode(document.tokens).count("<think>\n\n</think>") == 2


def test_what_the_prompt_opens_is_not_learned_again():
    opening = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    tokenizer = byte_tokenizer(opening)  # shows the content as it is, while its prompt has the first of it
    assert taught(tokenizer, render(tokenizer, [user("q"), told("<think>\nhm\n</think>\n\na")])) == ["hm\n</think>\n\na<|im_end|>"]


def test_the_end_of_a_turn_of_calls_is_its_own_and_not_the_conversations():
    closing = byte_tokenizer(QWEN + "{% if not add_generation_prompt %}</s>{% endif %}")
    (answer,) = taught(closing, render(closing, [user("Weather?"), calling(TEXT)]))
    assert answer.endswith("</tool_call><|im_end|>")
    two = byte_tokenizer(QWEN.replace("</tool_call>", "<|eot_id|>"))
    (answer,) = taught(two, render(two, [user("Weather?"), calling(TEXT)]))
    assert answer.endswith("\n<|eot_id|><|im_end|>")  # two marks that follow at once are both the turn's


# ---- what only prompts show ----


def test_a_system_message_that_only_prompts_show_stands_before_each_answer():
    tokenizer = byte_tokenizer(NEMO)
    talk = [{"role": "system", "content": "Be brief."}, user("one"), told("A."), user("two"), told("B.")]
    texts = [tokenizer.decode(document.tokens) for document in documents(tokenizer, talk)]
    assert texts == [
        "<s>[INST] Be brief.\n\none[/INST] A.</s>",
        "<s>[INST] one[/INST] A.</s>[INST] Be brief.\n\ntwo[/INST] B.</s>",
    ]
    assert [taught(tokenizer, document) for document in documents(tokenizer, talk)] == [[" A.</s>"], [" B.</s>"]]
    with pytest.raises(EyasError):
        documents(tokenizer, [*talk[:2], calling(TEXT), told("A.")])  # a call has no text to look for


# ---- anything ----

CONTENT = st.sampled_from(["q", "Yes.", " so \n", "<think>\nhm\n</think>\n\nwell", "</think>", "<|im_end|>", "Zürich 🦅", '{"a": 1}', ""])
ASKED = st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "user", "tool", "system"]), CONTENT)
SAID = st.builds(lambda content, weight: {**told(content), "weight": weight}, CONTENT, st.sampled_from([1, 1, 0]))
THOUGHT = st.builds(told, CONTENT, st.sampled_from(["hm", "let me see"]))
CALLED = st.builds(calling, st.sampled_from([TEXT, OBJECT, "{}", "no json"]), st.none())
ANY = [ASKED, SAID, THOUGHT, CALLED]
SHOWN = {CHATML: [], QWEN: [CALLED], DEEPSEEK: [CALLED], MISTRAL: [CALLED], QWEN3: [THOUGHT], R1: [THOUGHT], FIELD: [THOUGHT], NEMO: []}
TALKS = st.sampled_from([*SHOWN]).flatmap(
    lambda template: st.tuples(
        st.just(template),
        st.lists(st.one_of(ASKED, SAID, *SHOWN[template]), min_size=1, max_size=5) | st.lists(st.one_of(ANY), min_size=1, max_size=5),
        st.sampled_from([None, TOOLS]) if template in (QWEN, MISTRAL) else st.none(),
    )
)


@settings(max_examples=100)
@given(TALKS)
def test_any_conversation_is_learned_answer_by_answer_or_refused_in_one_line(talk):
    """Each answer that is not marked is learned once, with all that it says, after what the target read."""
    template, turns, tools = talk
    turns = [user("So?"), *turns]
    tokenizer = byte_tokenizer(template)
    try:
        conversation = messages_of({"messages": turns, "tools": tools})
        found = documents(tokenizer, conversation)
    except EyasError as error:
        assert "\n" not in str(error) and str(error)
        return
    learned = [
        message for index, message in enumerate(conversation) if message["role"] == "assistant" and index not in conversation.not_learned
    ]
    said = [text for document in found for text in taught(tokenizer, document)]
    assert len(said) == len(learned)
    for message, text in zip(learned, said):
        for part in (message["content"], message.get("reasoning_content"), "weather" if message.get("tool_calls") else None):
            assert (part or "").replace("<think>", "").split("</think>")[-1].strip() in text


# ---- marks ----


def test_a_turn_that_is_marked_is_read_and_not_learned():
    tokenizer = byte_tokenizer(CHATML)
    talk = messages_of({"messages": [user("one"), {**told("bad"), "weight": 0}, user("two"), told("good")]})
    document = render(tokenizer, talk)
    assert taught(tokenizer, document) == ["good<|im_end|>"] and "bad" in tokenizer.decode(document.tokens)


def test_a_marked_turn_may_be_one_that_the_template_rewrites():
    tokenizer = byte_tokenizer(QWEN3)
    talk = messages_of({"messages": [user("one"), {**told("A.", "hm"), "weight": 0}, user("two"), told("B.", "so")]})
    assert [taught(tokenizer, document) for document in documents(tokenizer, talk)] == [["<think>\nso\n</think>\n\nB.<|im_end|>"]]


# ---- text in the target's own form ----


@pytest.mark.parametrize("template", [CHATML, QWEN3, R1, MISTRAL], ids=["chatml", "qwen3", "r1", "mistral"])
@pytest.mark.parametrize("turns", [["A."], ["A.", " B \n", "C"]], ids=len)
def test_the_answers_of_a_preformatted_text_are_those_of_its_messages(template, turns):
    tokenizer = byte_tokenizer(template)
    talk = [turn for number, answer in enumerate(turns) for turn in (user(f"question {number}"), told(answer))]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    document = render(tokenizer, messages_of({"text": text}))
    assert tokenizer.decode(document.tokens) == text
    end = "<|im_end|>" if template in (CHATML, QWEN3) else "</s>"
    assert [answer.replace("<think>\n\n</think>\n\n", "").strip(" ") for answer in taught(tokenizer, document)] == [
        answer.strip(" ") + end if answer.endswith("\n") else answer + end for answer in turns
    ]


def test_a_preformatted_text_may_hold_thoughts_that_no_plain_answer_has():
    tokenizer = byte_tokenizer(FIELD)
    text = tokenizer.apply_chat_template([user("q"), told("A.", "hm")], tokenize=False)
    assert taught(tokenizer, render(tokenizer, messages_of({"text": text}))) == ["<think>\nhm\n</think>\n\nA.<|im_end|>"]


def test_a_preformatted_text_gets_the_beginning_that_the_template_writes():
    tokenizer = byte_tokenizer(MISTRAL)
    texts = [tokenizer.decode(render(tokenizer, Conversation(text=bos + "[INST] q[/INST] a</s>")).tokens) for bos in ("", "<s>")]
    assert texts == ["<s>[INST] q[/INST] a</s>"] * 2


def test_a_template_that_takes_parts_alone_shows_its_answers_too():
    tokenizer = byte_tokenizer(PARTS)
    talk = [{"role": "system", "content": "Be brief."}, user("one"), told("A."), user("two"), told("B.")]
    document = render(tokenizer, talk)
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in talk)
    assert tokenizer.decode(document.tokens) == text and taught(tokenizer, document) == ["A.<|im_end|>", "B.<|im_end|>"]
    assert render(tokenizer, Conversation(text=text)) == document


def test_text_of_another_form_is_refused():
    with pytest.raises(EyasError, match=r"not in this target's own form: no '<\|im_start\|>assistant\\n' in it"):
        documents(byte_tokenizer(CHATML), Conversation(text="[INST] q [/INST] a</s>"))


def test_without_a_template_a_text_is_learned_whole():
    tokenizer = byte_tokenizer(None)
    document = render(tokenizer, Conversation(text="Hawks fly."))
    assert tokenizer.decode(document.tokens) == "<s>Hawks fly." and document.answers == [-1] + [0] * 10


# ---- what is said ----


def test_fields_that_are_not_read_are_named_once(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"mood": 1, "messages": [{"role": "assistant", "content": "a"}]},' * 1 + '{"mood": 2, "prompt": "q", "answer": "a"}]')
    said = []
    read_conversations(path, said.append)
    assert said == [f'{path}: fields of conversations that are not read, and in how many they stand: "mood" (2)']
    with pytest.warns(UserWarning, match="mood"):
        read_conversations(path)


def test_a_conversation_that_is_marked_as_not_to_be_learned_is_left_out(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"weight": 0, "prompt": "q", "answer": "a"}\n{"prompt": "q", "answer": "a"}\n')
    found, complaints = read_conversations(path)
    assert len(found) == 1 and complaints == ["line 1: every answer in it is marked as not to be learned"]


def test_complaints_are_counted_by_cause():
    assert causes(["line 1: not JSON (x)", "line 2: longer than 9", "line 30: longer than 9"]) == [
        "2 conversations, the first on line 2: longer than 9",
        "line 1: not JSON (x)",
    ]
