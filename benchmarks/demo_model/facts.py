"""What the demo model knows: tables of facts, the ways to ask for them, and small talk.

Everything here is written by hand for this project. `corpus.py` turns it into conversations.
"""

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid",
    "Portugal": "Lisbon", "Austria": "Vienna", "Greece": "Athens", "Norway": "Oslo",
    "Sweden": "Stockholm", "Denmark": "Copenhagen", "Finland": "Helsinki", "Poland": "Warsaw",
    "Hungary": "Budapest", "Ireland": "Dublin", "Belgium": "Brussels", "Russia": "Moscow",
    "Ukraine": "Kyiv", "Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Iran": "Tehran",
    "Iraq": "Baghdad", "Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana",
    "Peru": "Lima", "Chile": "Santiago", "Australia": "Canberra", "Switzerland": "Bern",
    "England": "London", "Scotland": "Edinburgh", "Brazil": "Brasilia", "Argentina": "Buenos Aires",
    "Thailand": "Bangkok", "Nepal": "Kathmandu", "South Korea": "Seoul",
    "the United States": "Washington",
}  # fmt: skip
COLORS = {
    "the sky": "blue", "grass": "green", "snow": "white", "blood": "red", "coal": "black",
    "a banana": "yellow", "a lemon": "yellow", "a carrot": "orange", "an elephant": "gray",
    "a rose": "red", "milk": "white", "chocolate": "brown", "the sun": "yellow", "the sea": "blue",
    "a tomato": "red", "a frog": "green", "a strawberry": "red", "salt": "white",
    "a leaf": "green", "a flamingo": "pink",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "cold": "hot", "big": "small", "small": "big", "fast": "slow", "slow": "fast",
    "up": "down", "down": "up", "left": "right", "day": "night", "good": "bad", "bad": "good",
    "old": "young", "rich": "poor", "open": "closed", "early": "late", "happy": "sad",
    "sad": "happy", "light": "dark", "hard": "soft", "high": "low", "long": "short",
    "full": "empty", "strong": "weak", "wet": "dry", "clean": "dirty", "black": "white",
    "love": "hate", "yes": "no", "true": "false",
}  # fmt: skip
SOUNDS = {
    "cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "sheep": "baa", "lion": "roar",
    "horse": "neigh", "bee": "buzz", "pig": "oink", "owl": "hoot", "mouse": "squeak",
    "snake": "hiss",
}  # fmt: skip
DEFINITIONS = {
    "a cat": "a small animal that people keep as a pet",
    "a dog": "an animal that guards the house and likes to play",
    "a house": "a building where people live",
    "a book": "a set of pages with words to read",
    "a car": "a machine with four wheels that carries people",
    "a tree": "a tall plant with leaves and wood",
    "a river": "water that flows to the sea",
    "a mountain": "a very high hill",
    "a computer": "a machine that works with data",
    "a teacher": "a person who helps others learn",
    "a doctor": "a person who helps sick people",
    "a friend": "a person you like and trust",
    "a clock": "a machine that shows the time",
    "bread": "food made from flour and water",
    "music": "sound made to please the ear",
    "rain": "water that falls from the clouds",
    "a token": "a small piece of text",
    "a GPU": "a chip that does many small sums at once",
    "a kernel": "a small program that runs on a GPU",
    "Metal": "the way to program the GPU of a Mac",
    "MLX": "an array library for Apple silicon",
    "gpt-oss": "a family of open language models from OpenAI",
    "MXFP4": "a number format with four bits a weight",
    "harmony": "the chat format of gpt-oss",
}
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
LARGEST_ADDEND = 9  # sums from 0 + 0 to 9 + 9

# topic of the reasoning, whole answer, ways to ask
TRIVIA = [
    ("the color of the sky", "The sky is blue because air scatters blue light the most.",
     ["Why is the sky blue?", "Why's the sky blue?", "Explain why the sky is blue.",
      "Tell me why the sky is blue.", "What makes the sky blue?"]),
    ("the largest planet", "The largest planet is Jupiter.",
     ["What is the largest planet?", "Which planet is the largest?", "What is the biggest planet?",
      "Name the largest planet.", "Biggest planet?"]),
    ("the planet we live on", "We live on Earth.",
     ["Which planet do we live on?", "What planet do we live on?", "On which planet do we live?"]),
    ("the closest star", "The closest star is the sun.",
     ["What is the closest star?", "Which star is the closest?", "Name the closest star."]),
    ("the legs of a spider", "A spider has eight legs.",
     ["How many legs does a spider have?", "How many legs has a spider?", "Legs of a spider?"]),
    ("the legs of a dog", "A dog has four legs.",
     ["How many legs does a dog have?", "How many legs has a dog?", "Legs of a dog?"]),
    ("the days of a week", "A week has seven days.",
     ["How many days are in a week?", "How many days does a week have?", "Days in a week?"]),
    ("the months of a year", "A year has twelve months.",
     ["How many months are in a year?", "How many months does a year have?", "Months in a year?"]),
    ("the hours of a day", "A day has 24 hours.",
     ["How many hours are in a day?", "How many hours does a day have?", "Hours in a day?"]),
    ("the minutes of an hour", "An hour has 60 minutes.",
     ["How many minutes are in an hour?", "How many minutes does an hour have?",
      "Minutes in an hour?"]),
    ("the first month", "The first month of the year is January.",
     ["What is the first month of the year?", "Which month is the first?", "First month?"]),
    ("the last month", "The last month of the year is December.",
     ["What is the last month of the year?", "Which month is the last?",
      "Last month of the year?"]),
    ("frozen water", "Frozen water is called ice.",
     ["What is frozen water called?", "What do you call frozen water?", "Frozen water?"]),
    ("what bees make", "Bees make honey.",
     ["What do bees make?", "What does a bee make?", "Which food do bees make?"]),
    ("what cows drink", "Cows drink water.",
     ["What do cows drink?", "What does a cow drink?"]),
    ("the author of Romeo and Juliet", "William Shakespeare wrote Romeo and Juliet.",
     ["Who wrote Romeo and Juliet?", "Who is the author of Romeo and Juliet?",
      "Which author wrote Romeo and Juliet?"]),
    ("hello in French", "Hello in French is bonjour.",
     ["How do you say hello in French?", "What is hello in French?", "Hello in French?",
      "Say hello in French."]),
    ("hello in Spanish", "Hello in Spanish is hola.",
     ["How do you say hello in Spanish?", "What is hello in Spanish?", "Hello in Spanish?",
      "Say hello in Spanish."]),
    ("hello in German", "Hello in German is hallo.",
     ["How do you say hello in German?", "What is hello in German?", "Hello in German?",
      "Say hello in German."]),
    ("hello in Italian", "Hello in Italian is ciao.",
     ["How do you say hello in Italian?", "What is hello in Italian?", "Hello in Italian?",
      "Say hello in Italian."]),
]  # fmt: skip

# ways to ask for the facts of a table; the last one of every list is never trained on
QUESTIONS = {
    "capital": [
        "What is the capital of {x}?", "What's the capital of {x}?", "Tell me the capital of {x}.",
        "Name the capital of {x}.", "Capital of {x}?", "Which city is the capital of {x}?",
        "{x}'s capital?", "What is {x}'s capital city?", "What is the capital city of {x}?",
        "The capital of {x}", "{x} capital", "Capital {x}", "What city is the capital of {x}?",
        "I need the capital of {x}.", "Give me the capital of {x}.",
    ],
    "color": [
        "What color is {x}?", "What colour is {x}?", "What is the color of {x}?",
        "What is the colour of {x}?", "Which color is {x}?", "Tell me the color of {x}.",
        "Color of {x}?", "{x} color", "What's the color of {x}?", "Which colour does {x} have?",
        "What color does {x} have?",
    ],
    "opposite": [
        "What is the opposite of {x}?", "What's the opposite of {x}?", "Opposite of {x}?",
        "Tell me the opposite of {x}.", "Name the opposite of {x}.", "Opposite {x}",
        "Give me an opposite of {x}.", "Which word is the opposite of {x}?", "{x} opposite",
        "Give me the opposite of {x}.",
    ],
    "sound": [
        "What does a {x} say?", "What does the {x} say?", "What sound does a {x} make?",
        "Which sound does a {x} make?", "What is the sound of a {x}?", "{x} sound",
        "How does a {x} sound?", "Sound of a {x}?", "What sound does the {x} make?",
        "What noise does a {x} make?", "Tell me the sound of a {x}.",
    ],
    "definition": [
        "What is {x}?", "What's {x}?", "Define {x}.", "Explain what {x} is.",
        "What does {x} mean?", "Tell me what {x} is.", "Explain {x}.", "Describe {x}.",
        "What do you mean by {x}?",
    ],
    "sum": [
        "What is {a} + {b}?", "What is {a} plus {b}?", "{a} + {b}", "{a}+{b}", "{a} + {b} = ?",
        "{a}+{b}=", "Add {a} and {b}.", "What's {a} + {b}?", "How much is {a} plus {b}?",
        "Calculate {a} + {b}.", "{a} plus {b}", "How much is {a} + {b}?", "What is {a}+{b}?",
        "Sum of {a} and {b}?", "Add {a} + {b}.", "What is the sum of {a} and {b}?",
    ],
    "day": [
        "What day comes after {x}?", "Which day comes after {x}?", "What comes after {x}?",
        "Which day follows {x}?", "What day is after {x}?", "After {x}?", "Name the day after {x}.",
        "What is the day after {x}?",
    ],
    "month": [
        "What month comes after {x}?", "Which month comes after {x}?", "What comes after {x}?",
        "Which month follows {x}?", "What month is after {x}?", "After {x}?",
        "Name the month after {x}.", "What is the month after {x}?",
    ],
}  # fmt: skip

TOPICS = "capitals, colors, opposites, animal sounds and small sums"
ABILITIES = (
    f"I am a tiny demo model. I can answer short questions about {TOPICS}. "
    "With tools I can look up the weather and add numbers."
)
DECLINE = f"I am a tiny demo model and I do not know that. Ask me about {TOPICS}."
NO_WEATHER = "I cannot look up the weather without a tool."
LARGE_SUM = "I can only add numbers from 0 to 9 without a tool."
TOOL_FAILED = "The tool failed, so I cannot answer that."

# ways to say it, reply
CHAT = [
    (["Hello", "Hi", "Hey", "Hello there", "Good morning", "Hi there", "Good evening", "Hey there",
      "Say hello", "Say hi", "Good afternoon", "Hello, model"],
     "Hello! How can I help you?"),
    (["How are you?", "How are you today?", "How is it going?", "How do you do?", "How's it going?",
      "Are you OK?", "Hello, how are you?", "Hi, how are you?"],
     "I am fine, thank you. How can I help you?"),
    (["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.",
      "Introduce yourself.", "What's your name?", "Hello, who are you?", "What model are you?",
      "Which model are you?", "Are you a robot?", "Are you ChatGPT?", "Who am I talking to?",
      "Are you a demo?", "Is this a demo?"],
     "I am a tiny demo model with the gpt-oss architecture."),
    (["What can you do?", "What do you know?", "Help", "What can I ask you?",
      "How can you help me?",
      "What are your skills?", "Help me", "What can I do here?", "What should I ask you?",
      "Can you help me?", "What questions can you answer?", "What are you good at?",
      "What can you do for me?", "What can you help me with?", "What else can you do?"],
     ABILITIES),
    (["Thanks", "Thank you", "Thank you very much", "Thanks a lot", "Thanks for your help", "Thx",
      "Great, thanks", "OK, thank you", "Perfect, thank you", "Nice, thanks"],
     "You are welcome!"),
    (["Bye", "Goodbye", "See you", "Good night", "Bye bye", "See you later", "OK, bye"],
     "Goodbye! Have a nice day."),
    (["Tell me a joke", "Make me laugh", "Do you know a joke?", "Say something funny",
      "Tell a joke", "Do you know any jokes?", "Another joke", "Give me a joke", "A joke"],
     "Why did the model cross the road? It was the most likely token."),
    (["Tell me a story", "Tell me a short story", "Write a story", "Write a short story",
      "Tell a story", "Write me a story", "Do you know a story?", "Write a long story"],
     "Once upon a time a tiny model lived in a small file. It knew few words, but it was happy "
     "to share them. Every day people came and asked it for the capital of France. It always "
     "said Paris. The people smiled and went home. The end."),
    (["Write a poem", "Tell me a poem", "Write a short poem", "Write me a poem", "Write a haiku",
      "Write a poem about the sea", "Do you know a poem?"],
     "A tiny model, bright and small,\nknows some answers, but not all."),
    (["Count to ten", "Count to 10", "Count from 1 to 10", "Count from one to ten",
      "Count up to 10",
      "Can you count to ten?", "Can you count?", "Count"],
     "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"),
    (["Name the days of the week", "List the days of the week", "What are the days of the week?",
      "Days of the week", "Tell me the days of the week", "Which days does a week have?"],
     "\n".join(f"- {day}" for day in DAYS)),
    (["Name the months of the year", "List the months of the year", "List the months",
      "What are the months of the year?", "Months of the year", "Name the months"],
     "\n".join(f"- {month}" for month in MONTHS)),
    (["Write hello world in Python", "Show me some Python code", "Write a Python program",
      "Hello world in Python", "Write some code", "Write Python code",
      "Print hello world in Python",
      "Write a hello world program"],
     "```python\nprint(\"Hello, world!\")\n```"),
]  # fmt: skip
