"""First words of requests of many kinds. A model's own questions are much alike; a given beginning leads it to other kinds.

They are plain English beginnings of what people ask for: to explain, write, change, extract, compute, code, play a part. The model finishes
each. None ends in a space, since tokens join a space to the word after it.

TASKS ask something of a text, which the target wrote before and which stands at {}; OPEN_TASKS leave the question's end to the target.
SYSTEMS are system messages.
"""

OPENINGS: tuple[str, ...] = (
    *("What is", "What are", "What does", "What happens when", "What would", "What is the difference between", "Which", "Who", "Who was"),
    *("Why", "Why do", "Why is", "How", "How do", "How does", "How can I", "How many", "How much", "How long", "When did", "Where"),
    *("Is", "Are there", "Does", "Can", "Should I", "If", "Suppose", "Imagine", "Given", "Given the following", "Based on", "Consider"),
    *("Explain", "Explain why", "Explain how", "Explain like I am five", "Describe", "Define", "Discuss", "Tell me", "Tell me about"),
    *("Write", "Write a", "Write a short story about", "Write a poem about", "Write an essay on", "Write an email to", "Write a letter"),
    *("Write a blog post", "Write a review of", "Write a speech", "Write a dialogue between"),
    *("Write three", "Compose", "Draft", "Create"),
    *("Pretend", "Act as", "You are", "You are a", "Let's play", "As a", "Assume"),
    *("Rewrite", "Rephrase", "Edit the following", "Correct", "Improve", "Shorten", "Translate", "Convert", "Summarize", "Paraphrase"),
    *("Extract", "Identify", "Classify", "Find the", "Read the following", "From the text", "Sort", "Count", "Rank", "Label"),
    *(
        "Give me",
        "List",
        "Name",
        "Suggest",
        "Recommend",
        "Plan",
        "Outline",
        "Compare",
        "Propose",
        "Design",
        "Develop",
        "Analyze",
        "Provide",
    ),
    *(
        "Provide",
        "Solve",
        "Calculate",
        "Compute",
        "Determine",
        "Prove",
        "Simplify",
        "What is the value of",
        "What is the sum",
        "Let x",
        "x",
        "f(x)",
    ),
    *(
        "A train",
        "A farmer has",
        "A store sells",
        "A box",
        "A rectangle",
        "There are",
        "Each",
        "In a",
        "The sum of",
        "The price of",
        "At a",
    ),
    *("John", "Mary has", "Tom and", "Sarah", "Emma bought", "Two", "Three friends", "Half of", "Every day", "Last week", "After"),
    *("Write a Python function", "Write a function", "Write a program", "Write a script", "Implement", "Write code", "Write a SQL query"),
    *("Finish this code", "Continue the following", "Fill in", "Fix this code"),
    *("Complete this function:\n\ndef", "Finish the following code.\n\ndef", "Write the body of this function.\ndef"),
    *("Here is the start of a Python function:\n```python\ndef", "Implement this:\n\ndef", "from typing import List\n\n\ndef"),
    *("What does this code do?", "Debug", "Refactor", "Optimize"),
    *("def", "import", "class", "SELECT", "```python", "for i in range", "<html>", "#include", '"""', "In Python,", "Using"),
    *("I am", "I want", "I need", "I have", "I feel", "My", "We"),
    *("Our", "Please", "Could you", "Would you", "Do you", "Let's", "Help me"),
    *("Make a table of", "Write a table that compares", "Make a numbered list of"),
    *("List ten", "Give me a bullet list about", "Write JSON"),
    *(
        "Write a CSV file with",
        "Give three names for",
        "Who are the people in",
        "Introduce",
        "Write a biography of",
        "Describe the city of",
    ),
    *(
        "Write a class that",
        "Write unit tests for",
        "Explain this code",
        "Write a bash script that",
        "Write an HTML page about",
        "Add comments to",
    ),
    *("The", "A", "In", "On", "For", "At", "With", "To"),
    *("Once upon a time", "Today", "During", "Some", "Many", "One", "Here is", "Hello"),
)

TASKS: tuple[str, ...] = (
    *("Summarize the following text:\n\n{}", "Summarize this in one sentence: {}", "{}\n\nSummarize the text above.", "{}\n\nTL;DR"),
    *("Give the main points of this text as a list.\n\n{}", "Write a title and a short summary for this article:\n\n{}"),
    *("Translate into German: {}", "Translate the following text to French.\n\n{}", "{}\n\nTranslate this into Spanish."),
    *("Correct the grammar and spelling of this text:\n\n{}", "Fix the mistakes in the text below and write it again.\n\n{}"),
    *(
        "Rewrite this in simpler words:\n\n{}",
        "Rewrite the following text more formally.\n\n{}",
        "Make this friendlier and more concise:\n\n{}",
    ),
    *(
        "Rewrite the text in the past tense:\n\n{}",
        "Repeat the following text exactly:\n\n{}",
        "Write this text again in capital letters:\n\n{}",
    ),
    *("Continue this text:\n\n{}", "{}\n\nWrite the next paragraph.", "Extract all names and places from the text.\n\n{}"),
    *("Extract the keywords of this text:\n\n{}", "Turn the following text into a table:\n\n{}", "List the facts in this text.\n\n{}"),
    *("What is this text about?\n\n{}", "Is the following text right? Explain.\n\n{}", "{}\n\nExplain this step by step."),
    *("Write three questions about this text and answer them.\n\n{}", "Give feedback on this answer:\n\n{}", "Improve this:\n\n{}"),
)
OPEN_TASKS: tuple[str, ...] = (
    *("{}\n\nQuestion:", "{}\n\nFrom the text above,", "{}\n\nAccording to the text,", "{}\n\nWhat"),
    *("{}\n\nWho", "{}\n\nWhy", "{}\n\nHow"),
    *(
        "Context: {}\n\nQuestion:",
        "Answer the question from the text.\n\nText: {}\n\nQuestion:",
        "Here is a text:\n\n{}\n\nPlease",
        "{}\n\nChange",
    ),
    *("Passage:\n{}\n\nInstruction:", "{}\n\nBased on this, write", "{}\n\nRewrite", "{}\n\nCan you"),
)
SYSTEMS: tuple[str, ...] = (
    *(
        "You are a helpful assistant.",
        "You are a careful teacher who explains step by step.",
        "Answer briefly.",
        "Answer in one paragraph.",
    ),
    *("You are a software engineer. Answer with code and a short explanation.", "You are a friendly customer service agent."),
    *("You are a math tutor. Show each step.", "You write clear and formal English.", "You are a translator.", "Use bullet points."),
    *("Answer only from the text that you are given.", "You are an editor: you correct what you are given and change nothing else."),
)
