"""The many ways in which each question is put; ``{}`` and ``{other}`` stand for what it is about."""

WORDINGS: dict[str, tuple[str, ...]] = {
    "ground colour": (
        "What colour is the background?",
        "Which colour lies behind everything?",
        "The background is what colour?",
    ),
    "ground pattern": (
        "What pattern does the background have?",
        "Which pattern lies behind everything?",
        "How is the background patterned?",
    ),
    "count": (
        "How many {} are there?",
        "Count the {}.",
        "What is the number of {} in the picture?",
        "How many {} can you see?",
    ),
    "colour": (
        "What colour is the {}?",
        "Which colour does the {} have?",
        "Tell me the colour of the {}.",
        "The {} is what colour?",
    ),
    "shape": (
        "What shape is the {}?",
        "Which shape does the {} have?",
        "Tell me the shape of the {}.",
        "The {} is what shape?",
    ),
    "list": (
        "Which shapes are there?",
        "List the shapes in the picture.",
        "What shapes can you see?",
        "Name every shape that is there.",
    ),
    "relation": (
        "Where is the {} as seen from the {other}?",
        "On which side of the {other} is the {}?",
        "Seen from the {other}, where is the {}?",
    ),
    "beside": (
        "Is the {} to the left or to the right of the {other}?",
        "Left or right: where is the {} as seen from the {other}?",
    ),
    "over": ("Is the {} above or below the {other}?", "Above or below: where is the {} as seen from the {other}?"),
    "letter": (
        "Which letter is on the {}?",
        "What is the letter on the {}?",
        "Read the letter of the {}.",
        "The {} has which letter?",
        "Tell me the letter beside or on the {}.",
    ),
    "digit": (
        "Which digit is on the {}?",
        "What is the digit on the {}?",
        "Read the digit of the {}.",
        "The {} has which digit?",
        "Tell me the digit beside or on the {}.",
    ),
    "owner shape": ("Which shape has the {}?", "What is the shape that bears the {}?", "The {} is on which shape?"),
    "owner colour": (
        "Which colour has the shape with the {}?",
        "What colour is the thing that bears the {}?",
        "The {} is on which colour?",
    ),
    "larger": (
        "Which digit is larger, that of the {} or that of the {other}?",
        "Compare the digits of the {} and the {other}: which is the larger one?",
    ),
    "smaller": (
        "Which digit is smaller, that of the {} or that of the {other}?",
        "Compare the digits of the {} and the {other}: which is the smaller one?",
    ),
    "word": (
        "What does the {} say?",
        "Read the {}.",
        "Which word is on the {}?",
        "Spell the word on the {}.",
        "What is written on the {}?",
    ),
    "after": (
        "Which letter follows {} on the {other}?",
        "On the {other}, what comes right after {}?",
        "What is the letter after {} on the {other}?",
    ),
    "lead": (
        "Read the sign that has the colour of the {}.",
        "What does the sign in the colour of the {} say?",
        "Which word is on the sign as coloured as the {}?",
        "Find the sign with the same colour as the {} and read it.",
    ),
    "next": (
        "Which stop is to the {other} of {}?",
        "What comes to the {other} of stop {}?",
        "Leave {} to the {other}: where do you arrive?",
    ),
    "follow": (
        "Start at {} and go {other}. Where do you end?",
        "From stop {} travel {other}. Which stop is it?",
        "Go {other} from {}: where are you?",
    ),
    "path": (
        "Start at {} and go {other}. Name each stop.",
        "From stop {} travel {other}. Which stops do you pass?",
        "Go {other} from {}: list the stops.",
    ),
}

OPENINGS = ("",) * 7 + ("Look closely. ", "In this picture: ", "Please: ")
CLOSINGS = ("",) * 7 + (" Answer briefly.", " Be brief.")

MORE: dict[str, tuple[str, ...]] = {
    "colour": ("And what colour is it?", "And its colour?"),
    "shape": ("And what shape is it?", "And its shape?"),
    "letter": ("And which letter is on it?", "And its letter?"),
    "digit": ("And which digit is on it?", "And its digit?"),
}
"""How to ask on about what the last question was about."""
