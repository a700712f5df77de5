"""How `llava_smol` is asked: paraphrases of every kind of question, and what everybody knows without looking.

Every kind has sixteen paraphrases. The last `HELD_OUT` of each never occur in training; they are asked in the test
split alone. A paraphrase of the *path* kinds (one to four hops) has slots for the object and the attribute only, so
that questions of different depth can be asked in the same words.
"""

from __future__ import annotations

HELD_OUT = 4

SYSTEM_PROMPT = (
    "You are a careful assistant who looks at a drawing of small colored shapes and answers every question about it "
    "with as few words as possible."
)

# Paths, told: "red circle" -> left is "the shape directly left of the red circle".
DIRECTION_PHRASES = {
    "left": "the shape directly left of {x}",
    "right": "the shape directly right of {x}",
    "above": "the shape directly above {x}",
    "below": "the shape directly below {x}",
}
SAME_PHRASE = "the other shape with the same {attribute} as {x}"

# Paths, walked: every step takes as many tokens as every other (a test holds them to it).
STEP_PHRASES = {
    "stay": "stay on this shape",
    "left": "move to the left",
    "right": "move to the right",
    "above": "move one place up",
    "below": "move one place down",
    "same-color": "find its color match",
    "same-shape": "find its shape match",
    "same-size": "find its size match",
}

PATH = (
    "What {asked} is {x}?",
    "Which {asked} does {x} have?",
    "Tell me the {asked} of {x}.",
    "What is the {asked} of {x}?",
    "Name the {asked} of {x}.",
    "Look at {x}. What {asked} is it?",
    "Find {x}. Which {asked} does it have?",
    "In this picture, what {asked} is {x}?",
    "Look for {x}: what is its {asked}?",
    "Give the {asked} of {x}.",
    "Please say what {asked} {x} is.",
    "I want to know the {asked} of {x}.",
    "Could you tell me which {asked} {x} has?",
    "What would you say the {asked} of {x} is?",
    "Identify the {asked} of {x}.",
    "Take {x}: of what {asked} is it?",
)

WALK = (
    "Start at {x}, {first}, {second}, {third}. What {asked} is that shape?",
    "From {x}, {first}, {second}, {third}. Which {asked} do you find?",
    "Begin at {x}, {first}, {second}, {third}. Name the {asked} there.",
    "Go to {x}, {first}, {second}, {third}. What {asked} is it?",
    "Put a finger on {x}, {first}, {second}, {third}. Which {asked} is under it?",
    "Look at {x}, {first}, {second}, {third}. What {asked} do you see?",
    "Beginning with {x}, {first}, {second}, {third}. Give the {asked}.",
    "Follow me: from {x}, {first}, {second}, {third}. What {asked} is here?",
    "First find {x}, {first}, {second}, {third}. Say which {asked} it has.",
    "Walk from {x}, {first}, {second}, {third}. What is the {asked} now?",
    "Stand on {x}, {first}, {second}, {third}. Tell me the {asked}.",
    "A path: {x}, {first}, {second}, {third}. What {asked} does it end at?",
    "Set out from {x}, {first}, {second}, {third}. Which {asked} is reached?",
    "Place yourself at {x}, {first}, {second}, {third}. What {asked} is there?",
    "Take {x}, {first}, {second}, {third}. Of what {asked} is the last shape?",
    "With {x} as the start, {first}, {second}, {third}. Identify the {asked}.",
)

EXISTENCE = (
    "Is there {a} in the picture?",
    "Do you see {a}?",
    "Can you find {a} here?",
    "Does this image contain {a}?",
    "Is {a} shown?",
    "Is there {a} anywhere?",
    "Does the drawing have {a}?",
    "Look closely: is there {a}?",
    "Do any of the shapes look like {a}?",
    "Could you check whether there is {a}?",
    "Is {a} part of this drawing?",
    "Has the artist drawn {a}?",
    "Would you find {a} in this drawing?",
    "Is one of the shapes {a}?",
    "Tell me if there is {a}.",
    "Does {a} appear in the image?",
)

COUNT = (
    "How many {x} are there?",
    "How many {x} do you see?",
    "Count the {x}.",
    "What is the number of {x}?",
    "How many {x} are in the picture?",
    "Tell me how many {x} there are.",
    "How many {x} does the image show?",
    "Please count all {x}.",
    "In this drawing, how many {x} are there?",
    "Say how many {x} you can find.",
    "The number of {x} is what?",
    "How many {x} can be seen here?",
    "Give me the number of {x}.",
    "How many {x} does the drawing contain?",
    "What is the count of {x}?",
    "If you count the {x}, how many are there?",
)

RELATION = (
    "Is {x} {where} {y}?",
    "Does {x} lie {where} {y}?",
    "Is it true that {x} is {where} {y}?",
    "Can {x} be found {where} {y}?",
    "Do you see {x} {where} {y}?",
    "In this picture, is {x} {where} {y}?",
    "Look at {x}. Is it {where} {y}?",
    "Would you say {x} is {where} {y}?",
    "Is {x} placed {where} {y}?",
    "Check whether {x} is {where} {y}.",
    "Is {x} drawn {where} {y}?",
    "Tell me if {x} is {where} {y}.",
    "Does the drawing show {x} {where} {y}?",
    "Find {x}. Does it lie {where} {y}?",
    "Is the position of {x} {where} {y}?",
    "Could one say that {x} is {where} {y}?",
)

COMPARISON = (
    "Do {x} and {y} have the same {asked}?",
    "Is the {asked} of {x} the same as the {asked} of {y}?",
    "Are {x} and {y} of the same {asked}?",
    "Does {x} have the same {asked} as {y}?",
    "Compare {x} with {y}: same {asked}?",
    "Do {x} and {y} share their {asked}?",
    "Have {x} and {y} got the same {asked}?",
    "Is {x} of the same {asked} as {y}?",
    "Look at {x} and {y}. Is their {asked} the same?",
    "Is it true that {x} and {y} have one {asked}?",
    "Does {y} match {x} in {asked}?",
    "Are {x} and {y} equal in {asked}?",
    "Do {x} and {y} agree in {asked}?",
    "Would you say that {x} and {y} have the same {asked}?",
    "Is there no difference in {asked} between {x} and {y}?",
    "Tell me if {x} and {y} have the same {asked}.",
)

ARITHMETIC = (
    "What is {sum}?",
    "How much is {sum}?",
    "Calculate {sum}.",
    "What does {sum} make?",
    "Please work out {sum}.",
    "Tell me what {sum} is.",
    "What do you get for {sum}?",
    "Give the result of {sum}.",
    "Never mind the picture: what is {sum}?",
    "Can you compute {sum}?",
    "Solve {sum}.",
    "Find {sum}.",
    "What number is {sum}?",
    "How much do you get for {sum}?",
    "State the value of {sum}.",
    "What is the answer to {sum}?",
)

KNOWLEDGE = (
    "What {asked} is {thing}?",
    "Which {asked} does {thing} have?",
    "What is the {asked} of {thing}?",
    "Tell me the {asked} of {thing}.",
    "Name the {asked} of {thing}.",
    "What {asked} does {thing} usually have?",
    "Of what {asked} is {thing}?",
    "Give the {asked} of {thing}.",
    "Think of {thing}. What {asked} is it?",
    "Say what {asked} {thing} has.",
    "What {asked} would you expect of {thing}?",
    "From memory, which {asked} does {thing} have?",
    "Which {asked} is {thing}?",
    "In general, what {asked} is {thing}?",
    "Could you tell me the {asked} of {thing}?",
    "Imagine {thing}. Which {asked} does it have?",
)

# Text first, then the image: the described object is known only once the thing has been recalled.
RECALL_LOOK = (
    "What {asked} is the shape that has the {known} of {thing}?",
    "Which {asked} does the shape with the {known} of {thing} have?",
    "One shape has the {known} of {thing}. What {asked} is it?",
    "Find the shape with the {known} of {thing}. Which {asked} does it have?",
    "Tell me the {asked} of the shape that has the {known} of {thing}.",
    "Name the {asked} of the shape with the {known} of {thing}.",
    "Think of the {known} of {thing}. What {asked} is the shape that has it?",
    "Look for the {known} of {thing}: what {asked} is that shape?",
    "What is the {asked} of the shape with the same {known} as {thing}?",
    "The shape with the {known} of {thing} has which {asked}?",
    "Give the {asked} of the only shape with the {known} of {thing}.",
    "Which {asked} is the shape whose {known} is that of {thing}?",
    "A single shape shares its {known} with {thing}. Which {asked} is it?",
    "Search for the {known} of {thing}. What {asked} is the shape you found?",
    "Could you name the {asked} of the shape having the {known} of {thing}?",
    "Of what {asked} is the shape with the {known} of {thing}?",
)

# The image first, then text: the thing can be recalled only once the object has been seen.
LOOK_RECALL = (
    "Which of {things} has the {known} of {x}?",
    "Look at {x}. Which of {things} has its {known}?",
    "Out of {things}, which has the same {known} as {x}?",
    "Choose from {things}: what shares the {known} of {x}?",
    "Which one has the {known} of {x}: {things}?",
    "{x} has the {known} of what: {things}?",
    "Among {things}, what has the {known} of {x}?",
    "What has the same {known} as {x}: {things}?",
    "See {x}. Name which of {things} matches its {known}.",
    "Pick the one of {things} with the {known} of {x}.",
    "Which of {things} would match {x} in {known}?",
    "Of {things}, which one is like {x} in {known}?",
    "Tell me which of {things} has the {known} of {x}.",
    "Find {x}. Which of {things} comes in that {known}?",
    "Select from {things} what has the {known} of {x}.",
    "What comes in the {known} of {x}: {things}?",
)

PLACE = (
    "Where is {x}?",
    "Where do you see {x}?",
    "In which place is {x}?",
    "Find {x}: where is it?",
    "Tell me where {x} is.",
    "Where can {x} be found?",
    "Say where {x} lies.",
    "What is the place of {x}?",
    "In the picture, where is {x}?",
    "Point out where {x} is.",
    "Where has {x} been drawn?",
    "At which place is {x}?",
    "Where does {x} lie?",
    "Name the place of {x}.",
    "Look for {x}. Where is it?",
    "Could you say where {x} is?",
)

CAPTION = (
    "Describe the image.",
    "What is in the picture?",
    "Describe every shape.",
    "Tell me what you see.",
    "What does the drawing show?",
    "List all shapes with their places.",
    "Describe this drawing.",
    "Say what is shown.",
    "Go through the shapes one by one.",
    "What shapes are there, and where?",
    "Give a description of the picture.",
    "Write down all you see.",
    "Please describe the drawing.",
    "What can be seen here?",
    "Name all shapes and where they are.",
    "Give me a full description.",
)

# Things of a colour or shape that everybody knows; the first word of each is what answers say.
THINGS: dict[str, dict[str, dict[str, str]]] = {
    "color": {
        "red": {"blood": "blood", "strawberry": "a strawberry", "tomato": "a ripe tomato", "rose": "a classic rose"},
        "green": {"grass": "grass", "cucumber": "a cucumber", "broccoli": "broccoli", "spinach": "spinach"},
        "blue": {
            "sky": "the clear sky",
            "ocean": "the deep ocean",
            "jeans": "a pair of jeans",
            "sapphire": "a sapphire",
        },
        "yellow": {"banana": "a ripe banana", "lemon": "a lemon", "sunflower": "a sunflower", "corn": "sweet corn"},
        "purple": {"eggplant": "an eggplant", "lavender": "lavender", "plum": "a plum", "violet": "a violet flower"},
    },
    "shape": {
        "circle": {"wheel": "a wheel", "coin": "a coin", "moon": "the full moon", "clock": "a round clock"},
        "square": {"chessboard": "a chessboard", "die": "the face of a die", "tile": "a bathroom tile"},
        "triangle": {"pyramid": "the side of a pyramid", "pizza": "a slice of pizza", "tent": "the front of a tent"},
        "cross": {"plus": "a plus sign", "ambulance": "the sign on an ambulance", "church": "the sign on a church"},
    },
}
