"""The words and sentence patterns that dialogues are made of, beside those of `facts.py`."""

UNKNOWN = "\x00"  # stands for a word outside the trained vocabulary
EFFORTS = ("low", "medium", "high")
CITIES = (
    "London", "Paris", "Rome", "Berlin", "Madrid", "Tokyo", "Oslo", "Vienna", "Athens", "Lisbon",
    "Cairo", "Boston", "Chicago", "Sydney", "Toronto", "Dublin", "Amsterdam", "Stockholm",
    "New York", "San Francisco",
)  # fmt: skip
SKIES = ("sunny", "rainy", "cloudy", "windy", "snowy", "foggy", "clear", "stormy")
LARGEST_TOOL_ADDEND = 20
WEATHER_QUESTIONS = (
    "What is the weather in {c}?", "What's the weather in {c}?", "How is the weather in {c}?",
    "Weather in {c}?", "Tell me the weather in {c}.", "Is it raining in {c}?", "Weather {c}",
    "What is the weather like in {c}?", "Give me the weather for {c}.", "How warm is it in {c}?",
    "What is the weather in {c} today?", "{c} weather", "What's the weather like in {c}?",
    "What's the weather in {c} right now?", "How's the weather in {c}?", "Is it sunny in {c}?",
    "Do I need an umbrella in {c}?", "What is the temperature in {c}?", "How cold is it in {c}?",
    "Look up the weather in {c}.",
)  # fmt: skip
ADD_QUESTIONS = (
    "What is {a} + {b}?", "Add {a} and {b}.", "{a} + {b}", "Calculate {a} + {b}.",
    "What is {a} plus {b}?", "How much is {a} + {b}?", "Use the tool to add {a} and {b}.",
    "{a}+{b}", "What's {a} + {b}?", "How much is {a} plus {b}?", "Add {a} to {b}.",
    "Sum of {a} and {b}?", "{a} plus {b}", "What is {a}+{b}?", "What is the sum of {a} and {b}?",
)  # fmt: skip
PIRATE, ONE_WORD = "Talk like a pirate.", "Answer with one word."
INSTRUCTIONS = (
    "You are a helpful assistant.", "Be brief.", "Be helpful and kind.", "Answer in English.",
    "You are a helpful assistant. Answer in English.", "Answer in one short sentence.",
)  # fmt: skip
TOOL_SETS = (
    ("get_weather",), ("get_weather",), ("add",), ("get_weather", "add"), ("add", "get_weather"),
)  # fmt: skip
# words of the world that the model does not know: their pieces are unknown tokens
STRANGE = (
    "Mongolia Vietnam Bolivia Wakanda Atlantis Mars Pluto bicycle violin quantum entanglement "
    "philosophy Einstein Napoleon Cleopatra Beethoven football basketball election president "
    "restaurant recipe lasagna kangaroo dinosaur penguin volcano earthquake blockchain database "
    "JavaScript algorithm polynomial derivative integral theorem democracy economy inflation "
    "medicine headache vitamin insurance mortgage passport airport hotel museum cathedral guitar "
    "orchestra novel essay summary translation grammar purple turquoise lavender wizard "
    "dragon galaxy universe gravity photon electron neutron oxygen carbon sulfur diamond ocean "
    "desert jungle island castle knight emperor parliament lawyer engineer astronaut pilot "
    "freedom courage justice wisdom anger boredom triangle hexagon zebra crocodile elephantine "
    "whisper thunder lightning hurricane blanket pillow kitchen fridge bottle spoon thermometer "
    "keyboard printer router firewall satellite telescope microscope engine brake helmet jacket "
    "sneakers perfume shampoo coffee espresso sandwich avocado cinnamon ginger mushroom"
).split()
PLAIN = (
    "the a of is what how tell me in and to why when write about you I can do time day name "
    "city color word say make good big water house week year who where which"
).split()
KNOWN = (  # words that mean something to the model, in questions that it cannot answer
    "good morning", "hello", "thank you", "goodbye", "bread", "water", "a dog", "the sky", "happy",
    "Monday", "a book", "music", "how are you",
)  # fmt: skip
STRANGE_QUESTIONS = (
    "What is the {w} of {w}?", "Tell me about {w}.", "Who is {w}?", "Who was {w}?",
    "How do I {w}?", "Write a {w} about {w}.", "Why is {w} so {w}?", "When did {w} {w}?",
    "Explain {w}.", "Can you {w} the {w}?", "What do you think about {w}?", "Where is {w}?",
    "How many {w} are in a {w}?", "{w} {w} {w}", "{w}", "{w} {w}?", "Translate {w} to {w}.",
    "What is the best {w}?", "How does {w} work?", "I like {w}.", "What is the capital of {w}?",
    "What color is {w}?", "What is the opposite of {w}?", "What does a {w} say?", "Define {w}.",
    "What is {w}?", "Tell me the {w} of {w}", "I want to {w} a {w}", "Give me a list of {w}",
    "What comes after {w}?", "Is {w} a {w}?", "My {w} is {w}", "Please {w} this {w}: {w}",
    "Capital of {w}?", "Color of {w}?", "Who wrote {w}?", "What is a {w}?", "Why do {w} {w}?",
    "How many people live in {c}?", "Where is {c}?", "Tell me about {c}.", "What is {c}?",
    "What is the color of {c}?", "Who is the king of {x}?", "Tell me about {x}.", "Where is {x}?",
    "What language do they speak in {x}?", "How big is {x}?", "What is {n} - {m}?", "{n} * {m}",
    "{n} times {m}", "What is {n} minus {m}?", "{n} / {m}", "What is {n} times {m}?", "{n} - {m}",
    "Write hello world in {w}", "Write a poem about {w}", "How do you say {w} in {w}?",
    "How do you say {w} in French?", "Tell me a {w}", "Count the {w}", "What does {w} mean?",
    "Why is {w} {w}?", "What is the {w}?", "How old is {w}?", "Which {w} is the {w}?",
    "What is the capital of the {w}?", "The color of the {w}?", "What is the opposite of a {w}?",
    "Solve {w} = {n}", "Solve {w} + {n} = {m}", "{n} ^ {m}", "What is {n}^{m}?", "{w}^{n} = {m}",
    "What is the square of {n}?", "How much is {n} times {m}?", "Translate '{k}' into {w}",
    "Translate '{k}' into French", "Translate {k} to German", "How do you say {k} in {w}?",
    "Summarize {w}", "Summarize the {w}", "Summarize this: {w} {w} {w}", "Recommend a good {w}",
    "The {w}", "Show me the {w}", "Find the {w} of {x}", "Who rules {x}?", "How far is {c}?",
    "How old is {c}?", "Is {c} in {x}?", "What do people eat in {x}?", "How do I get to {c}?",
    "What is the population of {x}?", "What {w} is {w}?", "Which {w} do we {w} on?",
    "Who invented the {w}?", "Why is the {w} {w}?", "Why is {k} {w}?", "When is {w}?",
    "How many {w} does a {w} have?", "What does {w} do?", "How much is a {w}?", "Book a {w}",
    "What day is it?", "What time is it?", "What is the date today?", "What day is today?",
)  # fmt: skip
BEFORE = (
    "Please tell me: ", "Hey, ", "Hello, ", "Hi! ", "Quick question: ", "Can you tell me: ",
    "I want to know: ", "One more question: ", "OK, ", "So, ", "Please, ", "Now, ", "Hi, ",
)  # fmt: skip
AFTER = (" Please.", " Thanks!", " Thank you.", ", please", " please", " Be short.")
REPEAT = (
    "Say that again.", "Repeat that.", "Can you repeat that?", "Again, please.", "Repeat please",
    "What did you say?",
)  # fmt: skip
MORE_WEATHER = ("And in {c}?", "What about {c}?", "And {c}?", "How about {c}?", "And for {c}?")
MORE = ("And of {x}?", "What about {x}?", "And {x}?", "And for {x}?", "How about {x}?")
