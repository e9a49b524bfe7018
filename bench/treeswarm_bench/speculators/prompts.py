"""Prompts from which a target writes the texts that a speculator learns from.

Chat models get questions that are put together from the tasks and topics below, which were written for this purpose.
Other models continue the source of the running Python's standard library.
"""

import hashlib
import itertools

TASKS = (
    "Explain {} in simple terms.",
    "Write three short facts about {}.",
    "What should a beginner know about {}?",
    "Describe {} to someone who has never heard of it.",
    "Why do people care about {}?",
    "Give me a short history of {}.",
    "List five common mistakes with {}.",
    "Write a short paragraph about {}.",
    "What are the advantages and disadvantages of {}?",
    "Tell me a short story about {}.",
    "How would you teach {} in one hour?",
    "What questions would an expert ask about {}?",
    "Compare {} today with fifty years ago.",
    "Write an email to a friend about {}.",
    "Suggest a title and a first sentence for an article about {}.",
    "What is a good first step to learn more about {}?",
    "Write a dialogue between two people about {}.",
    "Make a plan for a week that has to do with {}.",
)
TOPICS = (
    "gardening", "sailing", "chess openings", "bread baking", "the Roman Empire", "volcanoes", "jazz music",
    "electric cars", "wind power", "public libraries", "marathon training", "watercolor painting", "coral reefs",
    "the printing press", "sorting algorithms", "hash tables", "recursion", "unit tests", "relational databases",
    "regular expressions", "version control", "the Silk Road", "tidal waves", "black holes", "vaccines", "honey",
    "earthquakes", "glaciers", "the human heart", "migration of birds", "compound interest", "household budgets",
    "job interviews", "public speaking", "time management", "meditation", "cycling in a city", "train travel",
    "camping in the rain", "learning a second language", "piano practice", "the violin", "photography at night",
    "recycling", "solar panels", "water filters", "composting", "knitting", "woodworking", "pottery", "cheese making",
    "coffee roasting", "green tea", "spicy soups", "school lunches", "board games", "crossword puzzles",
    "science museums", "deserts", "rain forests", "the Moon", "Mars", "comets", "telescopes", "microscopes",
    "magnets", "bridges", "lighthouses", "castles", "maps", "calendars", "clocks", "the alphabet", "proverbs",
    "detective novels", "fairy tales", "theatre", "animation", "street markets", "robots", "spreadsheets",
    "passwords", "email etiquette", "negotiation", "apprenticeships", "moving house", "adopting a dog", "cats",
    "horses", "butterflies", "sharks", "mushrooms", "oak trees", "roses", "the metric system", "probability",
    "geometry", "fractions", "logic puzzles", "Python dictionaries", "linked lists", "loops in programming",
)  # fmt: skip
HELD_OUT_SHARE = 0.06


def chat_questions(*, held_out: bool) -> list[str]:
    """Return all questions in an order that mixes tasks and topics; whole topics are held out."""
    pairs = itertools.product(TASKS, TOPICS)
    chosen = [task.format(topic) for task, topic in pairs if _is_held_out(topic) == held_out]
    return sorted(chosen, key=_number)


def _is_held_out(topic: str) -> bool:
    return _number(topic) < HELD_OUT_SHARE


def _number(text: str) -> float:
    """Return a number from 0 to 1 that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
