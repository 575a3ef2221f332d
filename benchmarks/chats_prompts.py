"""Prompts for conversations that models write themselves: questions of four kinds, and what is asked next.

Written for this file; nothing is drawn, so that the same number gives the same prompts.
"""

from collections.abc import Iterator

_THINGS = """the moon|a bicycle|bread|a volcano|the heart|rain|a library|glass|the number 12|a lighthouse|coffee|
an ant colony|a bridge|salt|the steam engine|a rainbow|paper|a chess game|honey|an earthquake|the printing press|
a kite|soap|tides|
a compass|cheese|a battery|the Roman alphabet|snow|a microscope|wheat|an elevator|a magnet|rust|the stock exchange|
a violin|yeast|a lock and key|cotton|a telescope|fermentation|a river delta|the thermometer|silk|a clock|an octopus|
concrete|a passport|photosynthesis|a map"""
_TASKS = """the largest of three numbers|whether a word reads the same backwards|the sum of the digits of a number|
the most frequent letter in a text|the days between two dates|the greatest common divisor of two numbers|
a list without repeated items|the words of a sentence in reverse order|whether a year is a leap year|
the lines of a file that hold a word|a temperature in Fahrenheit from one in Celsius|the second smallest item of a list|
the number of vowels in a word|the product of two matrices|a dictionary of word lengths"""
_QUESTIONS = (
    "Explain in two sentences what {} is.",
    "How would you describe {} to a child of six?",
    "Name three facts about {}.",
    "Why does {} matter to people? Answer briefly.",
    "Write a short poem of four lines about {}.",
)
_ASKED = ("Write a Python function that gives {}.", "How can I find {} in Python? Show the code only.")
_NEXT = (
    "Give one example.",
    "Say the same in one sentence.",
    "What is a common mistake about this?",
    "Can you translate your answer into French?",
    "Thank you! Is there anything else I should know?",
)
_SYSTEMS = (None, None, "You are a patient teacher.", "Answer in plain words. Never use more than sixty words.")


def prompts() -> Iterator[tuple[str | None, str, str]]:
    """System message or None, first question and second question of each conversation; 280 in all."""
    things, tasks = _items(_THINGS), _items(_TASKS)
    questions = [question.format(thing) for question in _QUESTIONS for thing in things]
    questions += [asked.format(task) for asked in _ASKED for task in tasks]
    # neighbours are of other kinds, so that a first part of them is like the whole
    for number in range(len(questions)):
        question = questions[number * 113 % len(questions)]
        yield _SYSTEMS[number % len(_SYSTEMS)], question, _NEXT[number % len(_NEXT)]


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split("|")]
